"""Speed without a GPU, beside llama.cpp and mlx-lm, all in one run and in turn.

    python -m benchmarks.cpu_speed MODEL [--gguf FILE --llama-python PYTHON] [--json]

MODEL is a folder in MLX's format (see `make_checkpoint` and `apertus-mlx convert`), FILE the same
geometry in GGUF (see `make_gguf`), PYTHON an interpreter that has llama-cpp-python. Every engine
keeps its own process and they take turns round after round; the ratios printed are medians of the
rounds' ratios, so that a machine that slows down or speeds up slows or speeds both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

PEERS = Path(__file__).with_name("cpu_peers.py")
OURS = ("ours-auto", "ours-float32")
# Tokens that a round times: mlx-lm takes a second for four.
SHORT = {"prefill": "prefill 16", "decode": "decode 16 4"}


class Worker:
    """An engine in its own process."""

    def __init__(self, engine: str, model: str, threads: int, python: str) -> None:
        self.engine = engine
        command = [python, str(PEERS), engine, model, str(threads)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.loaded = self._answer()
        self.peak_mib = 0.0

    def time(self, command: str) -> float:
        """Tokens per second of `command`."""
        assert self._process.stdin is not None
        print(command, file=self._process.stdin, flush=True)
        answer = self._answer()
        self.peak_mib = answer.get("peak_mib", 0.0)
        return answer["tokens_per_s"]

    def close(self) -> None:
        """End the process."""
        self._process.communicate()

    def _answer(self) -> dict[str, float]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.engine} ended without an answer")
        answer: dict[str, float] = json.loads(line)
        return answer


def measure(
    workers: list[Worker], commands: dict[str, str], rounds: int
) -> Iterator[tuple[str, dict[str, list[float]]]]:
    """Tokens per second of each command: one list per engine, one entry per round."""
    for label, command in commands.items():
        rates: dict[str, list[float]] = {worker.engine: [] for worker in workers}
        for number in range(rounds + 1):
            for worker in workers:
                is_slow = worker.engine.startswith("mlx-lm")
                if is_slow and (command.split()[1] == "4000" or number > 2):
                    continue
                rate = worker.time(SHORT[command.split()[0]] if is_slow else command)
                if number > 0:  # The first round warms up.
                    rates[worker.engine].append(rate)
        yield label, rates


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--llama-python", default=sys.executable)
    parser.add_argument("--no-mlx-lm", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()

    model = str(arguments.model)
    workers = [Worker(name, model, arguments.threads, sys.executable) for name in OURS]
    if arguments.gguf:
        path = str(arguments.gguf)
        workers.append(Worker("llama.cpp", path, arguments.threads, arguments.llama_python))
    if not arguments.no_mlx_lm:
        for name in ("mlx-lm-float32", "mlx-lm"):
            workers.append(Worker(name, model, arguments.threads, sys.executable))
    commands = {
        "prefill 256": "prefill 256",
        "decode at 256": "decode 256 64",
        "prefill 4000": "prefill 4000",
        "decode at 4000": "decode 4000 32",
    }
    report: dict[str, object] = {"model": model, "threads": arguments.threads}
    for label, rates in measure(workers, commands, arguments.rounds):
        report[label] = rates
        if not arguments.json:
            print(label)
            for line in _lines(rates):
                print(line, flush=True)
    peaks = {worker.engine: round(worker.peak_mib) for worker in workers}
    loads = {worker.engine: round(worker.loaded["load_s"], 2) for worker in workers}
    report["peak_mib"], report["load_s"] = peaks, loads
    if arguments.json:
        print(json.dumps(report, indent=2))
    else:
        print(f"peak resident MiB: {peaks}\nload s: {loads}")
    for worker in workers:
        worker.close()


def _lines(rates: dict[str, list[float]]) -> Iterator[str]:
    for engine, values in rates.items():
        if not values:
            continue
        line = f"  {engine:15} {statistics.median(values):8.2f} tokens/s (best {max(values):.2f})"
        for ours in OURS:
            if engine not in OURS:
                ratios = [a / b for a, b in zip(rates[ours], values, strict=False)]
                line += f"; {ours} {statistics.median(ratios):.2f} x"
        yield line


if __name__ == "__main__":
    main()
