"""What a cut vocabulary spares: bytes, memory and speed, beside what the planner says.

    python -m benchmarks.small_vocabulary FOLDER [--vocab 65536] [--bits 4] [--tokens 32]

FOLDER is an unquantized checkpoint (`python -m benchmarks.make_checkpoint 0.5B FOLDER`). It is
converted twice, whole and cut. Each is then run in fresh processes, in turn. Printed are the bytes
of the files and those that the plan has, what the planner says of the process, the peak that the
process had, and the median of tokens per second. A text takes more tokens with the cut vocabulary,
so the ratio of speeds is printed for tokens and for text.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from apertus_mlx import convert_model, load
from apertus_mlx.system.sizes import format_bytes

PROMPT_TOKENS = 16


def main() -> None:
    """Convert, run and print a line for each figure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--vocab", type=int, default=65_536)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(run_one(given.folder, given.tokens)))
        return
    with tempfile.TemporaryDirectory() as folder:
        made = {
            "whole": convert_model(given.folder, Path(folder) / "whole", bits=given.bits),
            "cut": convert_model(
                given.folder, Path(folder) / "cut", bits=given.bits, vocab=given.vocab
            ),
        }
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in made}
        for _ in range(given.rounds):
            for name, conversion in made.items():
                runs[name].append(run(conversion.output, given.tokens))
        for name, conversion in made.items():
            planned = sum(file.size_bytes for file in conversion.plan.files)
            paths = list(conversion.output.iterdir())
            weights = sum(p.stat().st_size for p in paths if p.suffix == ".safetensors")
            rest = sum(p.stat().st_size for p in paths if p.suffix != ".safetensors")
            speed = statistics.median(one["tokens_per_s"] for one in runs[name])
            peaks = [one["peak_bytes"] for one in runs[name]]
            print(
                f"{name:6} weights {weights:,} bytes (planned {planned:,}), other files {rest:,}; "
                f"memory {format_bytes(min(peaks))} to {format_bytes(max(peaks))} (planned "
                f"{format_bytes(runs[name][0]['planned'])}); "
                f"{speed:.2f} tokens/s"
            )
        ratios = [
            cut["tokens_per_s"] / whole["tokens_per_s"]
            for whole, cut in zip(runs["whole"], runs["cut"], strict=True)
        ]
        cut = made["cut"].cut
        assert cut is not None
        factor = statistics.median(found.factor for found in cut.inflation)
        print(
            f"speed, turn by turn: {statistics.median(ratios):.3f} in tokens, "
            f"{statistics.median(ratios) / factor:.3f} in text (median of the languages: "
            f"{factor:.3f} times as many tokens)"
        )


def run(folder: Path, tokens: int) -> dict[str, Any]:
    """Measure a model in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.small_vocabulary", str(folder), "--one"]
    done = subprocess.run(
        [*command, "--tokens", str(tokens)], check=True, capture_output=True, text=True
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def run_one(folder: Path, tokens: int) -> dict[str, Any]:
    """Decode `tokens` tokens after a short prompt, the first not timed."""
    with load(folder, context=256) as model:
        pieces = iter(
            model.stream("a " * PROMPT_TOKENS, max_tokens=tokens, temperature=0, raw=True)
        )
        next(pieces)
        began = time.perf_counter()
        for _ in pieces:
            pass
        seconds = time.perf_counter() - began
        planned = model.memory["total_bytes"]
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"tokens_per_s": (tokens - 1) / seconds, "peak_bytes": peak, "planned": planned}


if __name__ == "__main__":
    main()
