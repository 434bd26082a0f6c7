"""Decoding speed at a context of 4,096 tokens: each cache form against mlx-lm's caches, in one run.

    python -m benchmarks.kv_speed [--size 0.5B] [--layers 4] [--context 4096]

Few layers, because what is compared is the attention of each layer; the head is left out of the
step for the same reason. Caches are filled with random rows. Forms take turns, and the median of
the turns is given, so that a busy machine hits all alike.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import mlx.core as mx

from apertus_mlx.cache import FULL_PRECISION, CacheConfig
from benchmarks.kv_models import build, fill, settings


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", default="0.5B")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--turns", type=int, default=15)
    arguments = parser.parse_args()
    from mlx_lm.models.cache import KVCache, QuantizedKVCache

    model, theirs = build(settings(arguments.size, arguments.layers), bits=4)
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
        fill(caches, model, arguments.context)
    token = mx.array([[5]])
    times: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(arguments.turns + 1):
        for name, (runner, caches) in cases.items():
            started = time.perf_counter()
            # Four steps a turn, so that quantizing a block now and then is part of it.
            for _ in range(4):
                mx.eval(runner.model(token, caches))
            if turn:
                times[name].append((time.perf_counter() - started) / 4)
    median = {name: statistics.median(found) for name, found in times.items()}
    print(f"{arguments.size} geometry, {arguments.layers} layers, {arguments.context} positions\n")
    print(f"{'cache':22} {'ms/step':>8} {'x mlx-lm full':>14} {'x mlx-lm same bits':>19}")
    for name, found in median.items():
        bits = next((b for b in ("8 bits", "4 bits") if b in name), None)
        same = f"{median[f'mlx-lm {bits}'] / found:19.2f}" if bits else ""
        print(f"{name:22} {1000 * found:8.2f} {median['mlx-lm full'] / found:14.2f} {same}")


if __name__ == "__main__":
    main()
