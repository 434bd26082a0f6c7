"""Decoding speed at long contexts: each cache form against mlx-lm's caches, in one run.

    python -m benchmarks.kv_speed [--size 0.5B] [--layers 4] [--contexts 4096 16384 65536]

Few layers, because what is compared is the attention of each layer; the head is left out of the
step for the same reason. Caches are filled with random rows. Forms take turns, and the median of
the turns is given, so that a busy machine hits all alike. Not every backend of MLX multiplies
mlx-lm's quantized caches: those are refused then.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import mlx.core as mx

from apertus_mlx.backend import hardware, tf32
from apertus_mlx.cache import FULL_PRECISION, CacheConfig
from apertus_mlx.model.apertus import Model
from apertus_mlx.system.foreign_errors import refused_by_backend
from benchmarks.kv_models import build, fill, settings

# Steps of a turn, so that quantizing a block now and then is part of it.
STEPS = 4


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", default="0.5B")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--contexts", type=int, nargs="+", default=[4096])
    parser.add_argument("--turns", type=int, default=15)
    arguments = parser.parse_args()
    tf32.switch_off()
    model, theirs = build(settings(arguments.size, arguments.layers), bits=4)
    print(f"{arguments.size} geometry, {arguments.layers} layers, {hardware.device_name()}")
    for context in arguments.contexts:
        report(context, median_steps(model, theirs, context, arguments.turns))


def median_steps(model: Model, theirs: Any, context: int, turns: int) -> dict[str, float | None]:
    """Seconds of a step for each form of cache; None where MLX refuses it here."""
    from mlx_lm.models.cache import KVCache, QuantizedKVCache

    cases: dict[str, tuple[Any, list[Any]]] = {
        "mlx-lm full": (theirs, [KVCache() for _ in model.layers]),
        "mlx-lm 8 bits": (theirs, [QuantizedKVCache(64, 8) for _ in model.layers]),
        "mlx-lm 4 bits": (theirs, [QuantizedKVCache(64, 4) for _ in model.layers]),
        "full": (model, model.make_cache(FULL_PRECISION)),
        "8 bits": (model, model.make_cache(CacheConfig(8, 8))),
        "4 bits": (model, model.make_cache(CacheConfig(4, 4))),
        "4 bits, no rotation": (model, model.make_cache(CacheConfig(4, 4, rotate=False))),
        "3 bits": (model, model.make_cache(CacheConfig(3, 3))),
        "full, bound 1024": (model, model.make_cache(CacheConfig(bound=1024))),
        "4 bits, bound 1024": (model, model.make_cache(CacheConfig(4, 4, bound=1024))),
    }
    for _, caches in cases.values():
        fill(caches, model, context)
    token = mx.array([[5]])
    times: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(turns + 1):
        for name, (runner, caches) in list(cases.items()):
            started = time.perf_counter()
            try:
                for _ in range(STEPS):
                    mx.eval(runner.model(token, caches))
            except RuntimeError as error:
                if not refused_by_backend(error):
                    raise
                del cases[name]
            # What is compiled at its first use is no part of the first turn.
            if turn:
                times[name].append((time.perf_counter() - started) / STEPS)
    return {name: statistics.median(times[name]) if name in cases else None for name in times}


def report(context: int, median: dict[str, float | None]) -> None:
    """Print a table, with the speed beside mlx-lm's full cache and the one of the same bits."""
    print(f"\n{context} positions")
    print(f"{'cache':22} {'ms/step':>8} {'x mlx-lm full':>14} {'x mlx-lm same bits':>19}")
    for name, found in median.items():
        if found is None:
            print(f"{name:22}  refused")
            continue
        bits = next((b for b in ("8 bits", "4 bits") if b in name), None)
        full, alike = median["mlx-lm full"], median.get(f"mlx-lm {bits}")
        ratios = [f"{full / found:14.2f}" if full else " " * 14]
        ratios += [f"{alike / found:19.2f}" if alike else ""]
        print(f"{name:22} {1000 * found:8.2f} {' '.join(ratios)}".rstrip())


if __name__ == "__main__":
    main()
