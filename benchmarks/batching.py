"""Decode speed with many rows at once, beside mlx-lm's BatchGenerator, both on MLX in float32.

    python -m benchmarks.batching MODEL_DIR [--rows 1 2 4 8 16] [--rounds 3] [--json]

Both hold the same weights, cast to float32, in one process, and decode greedily after prompts of
different lengths. In each round they take turns at each number of rows; a figure is the median over
rounds, a ratio the median of the rounds' ratios. Reading the prompts is not timed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx

from apertus_mlx.backend.hardware import has_gpu
from apertus_mlx.backend.mlx import load_model
from apertus_mlx.generation.batch import Batch, Row
from apertus_mlx.generation.sampling import Sampler, SamplingParams
from apertus_mlx.model.apertus import Model


def main() -> None:
    """Measure, and print a table, or one JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=48)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    ours = load_model(arguments.model, "float32")
    theirs, _ = importlib.import_module("mlx_lm.utils").load_model(arguments.model)
    theirs.set_dtype(mx.float32)
    mx.eval(theirs.parameters())
    sides: dict[str, Callable[[list[list[int]], int], float]] = {
        "ours": lambda prompts, steps: time_ours(ours, prompts, steps),
        "mlx-lm": lambda prompts, steps: time_theirs(theirs, prompts, steps),
    }
    rates: dict[int, dict[str, list[float]]] = {
        rows: {name: [] for name in sides} for rows in arguments.rows
    }
    for turn in range(arguments.rounds):
        for rows in arguments.rows:
            given = prompts_of(rows, arguments.prompt_tokens, ours.config.vocab_size)
            for name in sorted(sides, reverse=bool(turn % 2)):
                seconds = sides[name](given, arguments.steps)
                rate = rows * arguments.steps / seconds
                rates[rows][name].append(rate)
                note = f"round {turn + 1}, {rows} rows, {name}: {rate:.2f} tokens/s"
                print(note, file=sys.stderr, flush=True)
    report = {
        "device": "MLX on the GPU" if has_gpu() else "MLX on the CPU",
        "rows": {rows: summary(found) for rows, found in rates.items()},
    }
    if arguments.json:
        print(json.dumps(report, indent=2))
        return
    print(f"{report['device']}, float32: tokens decoded in a second, all rows together")
    print(f"{'rows':>5} {'ours':>9} {'mlx-lm':>9} {'ratio':>7}")
    for rows, found in report["rows"].items():  # type: ignore[attr-defined]
        print(f"{rows:>5} {found['ours']:>9.2f} {found['mlx-lm']:>9.2f} {found['ratio']:>7.2f}")


def summary(found: dict[str, list[float]]) -> dict[str, float]:
    """Medians over rounds, and the median of ours / theirs."""
    ratios = [ours / theirs for ours, theirs in zip(found["ours"], found["mlx-lm"], strict=True)]
    medians = {name: statistics.median(rates) for name, rates in found.items()}
    return {**medians, "ratio": statistics.median(ratios)}


def prompts_of(rows: int, tokens: int, vocab_size: int) -> list[list[int]]:
    """Random prompts of half to one and a half times `tokens`."""
    chance = random.Random(rows)
    return [
        [chance.randrange(1000 % vocab_size, vocab_size) for _ in range(length)]
        for length in (chance.randrange(tokens // 2, tokens * 3 // 2) for _ in range(rows))
    ]


def time_ours(model: Model, prompts: list[list[int]], steps: int) -> float:
    """Seconds that `steps` steps of all rows take."""
    batch = Batch(model)
    greedy = SamplingParams(temperature=0)
    for prompt in prompts:
        sampler = Sampler(greedy, prompt, model.config.output_vocab_size)
        batch.join(Row(prompt, sampler, 10**6))
    while batch.waiting:
        batch.read()
    batch.step()  # the first one of any shape is slower
    started = time.perf_counter()
    for _ in range(steps):
        batch.step()
    return time.perf_counter() - started


def time_theirs(model: Any, prompts: list[list[int]], steps: int) -> float:
    """The same of mlx-lm."""
    generator = importlib.import_module("mlx_lm.generate").BatchGenerator(
        model, max_tokens=10**6, completion_batch_size=len(prompts)
    )
    generator.insert(prompts)
    while len(generator.next_generated()) < len(prompts):
        pass
    started = time.perf_counter()
    for _ in range(steps):
        generator.next_generated()
    seconds = time.perf_counter() - started
    generator.close()
    return seconds


if __name__ == "__main__":
    main()
