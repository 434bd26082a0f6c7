"""Memory of the caches in real geometry: peak at 4,096 tokens, and 20,000 tokens through a bound.

    python -m benchmarks.kv_memory [--size 0.5B] [--step 64] [--tokens 20000]

Beside mlx-lm's own caches in the same run. For the peak, caches are filled with random rows and
the last chunk of the prompt and some tokens go through the model: the chunk whose peak is highest.
"""

from __future__ import annotations

import argparse
import gc
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from apertus_mlx.cache import CacheConfig
from benchmarks.kv_models import arrays, build, fill, nbytes, settings

CONTEXT = 4096


def peak(name: str, runner: Any, caches: list[Any], model: Any, step: int, weights: int) -> None:
    """Print MLX's peak of the last chunk and of decoding, against the bar."""
    gc.collect()
    mx.clear_cache()
    others = mx.get_active_memory() - weights
    # Not part of the peak: filled all at once, layers grow together, which a model's never do.
    fill(caches, model, CONTEXT - step - 4, step=512)
    mx.reset_peak_memory()
    ids = mx.array([[5] * step])
    hidden = runner.model(ids, caches)
    mx.eval([arrays(cache) for cache in caches], hidden[:, -1:])
    for _ in range(4):
        mx.eval(runner(ids[:, :1], caches))
    measured = mx.get_peak_memory() - others
    kv = nbytes(caches)
    bar = 1.15 * (weights + kv) + 40e6
    print(
        f"{name:20} KV {kv / 1e6:7.1f} MB  peak {measured / 1e6:7.1f} MB  "
        f"1.15 * (weights + KV) + 40 MB = {bar / 1e6:7.1f} MB  {measured / bar:.3f}",
        flush=True,
    )


def flat(name: str, runner: Any, caches: list[Any], tokens: int) -> None:
    """Print how MLX's memory and resident memory move while `tokens` pass."""
    ids = mx.array([[5]])
    at, active, resident = [], [], []
    for count in range(1, tokens + 1):
        mx.eval(runner(ids, caches))
        if count % 256 == 0:
            mx.clear_cache()
        if count % 500 == 0 and count >= 2000:
            at.append(count)
            active.append(mx.get_peak_memory())
            resident.append(resident_bytes())
            mx.reset_peak_memory()
    slopes = [np.polyfit(at, values, 1)[0] for values in (active, resident)]
    print(
        f"{name:28} KV {nbytes(caches) / 1e6:6.2f} MB  peak slope {slopes[0]:8.1f} B/token  "
        f"resident slope {slopes[1]:8.1f} B/token  over {tokens} tokens",
        flush=True,
    )


def resident_bytes() -> int:
    """Resident memory of this process (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", default="0.5B")
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--step", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=20_000, help="0: only the peak")
    arguments = parser.parse_args()
    from mlx_lm.models.cache import KVCache, QuantizedKVCache, RotatingKVCache

    narrow = {
        "hidden_size": 128, "intermediate_size": 256, "vocab_size": 256,
        "num_attention_heads": 2, "num_key_value_heads": 1,
    }  # fmt: skip
    tiny, tiny_theirs = build({**settings("0.5B", 2), **narrow}, bits=None)
    bound = 1024
    for name, runner, caches in (
        ("bound 1024", tiny, tiny.make_cache(CacheConfig(bound=bound))),
        ("bound 1024, 4 bits", tiny, tiny.make_cache(CacheConfig(4, 4, bound=bound))),
        ("mlx-lm rotating 1024", tiny_theirs, [RotatingKVCache(bound, 4) for _ in tiny.layers]),
        ("mlx-lm full", tiny_theirs, [KVCache() for _ in tiny.layers]),
        ("mlx-lm 4 bits", tiny_theirs, [QuantizedKVCache(64, 4) for _ in tiny.layers]),
    ):
        mx.clear_cache()
        if arguments.tokens:
            flat(name, runner, caches, arguments.tokens)
    model, theirs = build(settings(arguments.size, arguments.layers), bits=4)
    weights = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    print(f"{arguments.size}, {arguments.layers} layers, 4 bits: weights {weights / 1e6:.1f} MB")
    for name, runner, caches in (
        ("4 bits", model, model.make_cache(CacheConfig(4, 4))),
        ("full", model, model.make_cache(CacheConfig())),
        ("mlx-lm 4 bits", theirs, [QuantizedKVCache(64, 4) for _ in model.layers]),
        ("mlx-lm full", theirs, [KVCache() for _ in model.layers]),
    ):
        peak(name, runner, caches, model, arguments.step, weights)


if __name__ == "__main__":
    main()
