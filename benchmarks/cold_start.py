"""How long a fresh process takes to the first token: the embedded model, and the real vocabulary.

    python -m benchmarks.cold_start [--rounds 9]

Each round starts, in turn: the embedded model (1,792 tokens); a small model with the released
vocabulary (131,072 tokens) whose `tokenizer.json` is read; and the same with the vocabulary as a
table. Printed are medians of seconds and of the ratios to the embedded model in the same round.
The released vocabulary needs `mistral-common`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from apertus_mlx.system.user_folders import CACHE_VARIABLE
from benchmarks.make_checkpoint import write_checkpoint

PROMPT = ["generate", "The capital of France is", "-n", "1", "--raw", "--temperature", "0"]


def main() -> None:
    """Run the three in turn and print a line for each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        real = Path(folder) / "real"
        write_checkpoint("tiny", real, 2**30)
        kept, none = Path(folder) / "kept", Path(folder) / "none"
        none.touch()  # no cache folder can be made there
        starts = {
            "embedded": (kept, []),
            "real, tokenizer.json": (none, ["-m", str(real)]),
            "real, table": (kept, ["-m", str(real)]),
        }
        for cache, more in starts.values():
            start(cache, more)
        seconds: dict[str, list[float]] = {name: [] for name in starts}
        for _ in range(rounds):
            for name, (cache, more) in starts.items():
                seconds[name].append(start(cache, more))
    for name, times in seconds.items():
        ratios = [one / other for one, other in zip(times, seconds["embedded"], strict=True)]
        print(f"{name:22} {statistics.median(times):.2f} s  {statistics.median(ratios):.2f}")


def start(cache: Path, more: list[str]) -> float:
    """Seconds that a process takes until it has ended, one token later."""
    command = [sys.executable, "-m", "apertus_mlx", *PROMPT, *more]
    began = time.perf_counter()
    subprocess.run(
        command, check=True, capture_output=True, env={**os.environ, CACHE_VARIABLE: str(cache)}
    )
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
