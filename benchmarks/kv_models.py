"""Random models of released geometry, in our class and in mlx-lm's, with the same weights."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from apertus_mlx.backend import hardware
from apertus_mlx.checkpoint.config import parse_config
from apertus_mlx.model.apertus import Model
from benchmarks.make_checkpoint import config


def settings(size: str, layers: int) -> dict[str, Any]:
    """The config of a released size, with as many layers as wanted."""
    return {**config(size), "num_hidden_layers": layers, "max_position_embeddings": 131_072}


def build(values: dict[str, Any], bits: int | None) -> tuple[Model, Any]:
    """Both classes with the same random weights, quantized in groups of 64 if `bits` says so.

    In float32, or in bfloat16 where MLX has a GPU.
    """
    from mlx_lm.models import apertus

    model = Model(parse_config(values))
    model.on_gpu, model.whole_codes = hardware.has_gpu(), hardware.refuses_slices()
    if model.on_gpu:
        model.set_dtype(mx.bfloat16)
    if bits is not None:
        nn.quantize(model, group_size=64, bits=bits)
    mx.eval(model.parameters())
    for layer in model.layers:
        layer.mlp.act_fn.fuse(compiled=False)
    theirs = apertus.Model(apertus.ModelArgs.from_dict(values))
    if bits is not None:
        nn.quantize(theirs, group_size=64, bits=bits)
    weights = dict(tree_flatten(model.parameters()))
    theirs.load_weights(list(theirs.sanitize(weights).items()))
    return model, theirs


def fill(caches: list[Any], model: Model, positions: int, step: int = 512) -> None:
    """Write random keys and values of `positions` into every layer's cache."""
    heads, width = model.config.num_key_value_heads, model.config.head_dim
    for start in range(0, positions, step):
        length = min(step, positions - start)
        dtype = mx.bfloat16 if model.on_gpu else mx.float32
        rows = mx.random.normal((1, heads, length, width), dtype)
        for cache in caches:
            cache.update_and_fetch(rows, rows)
        mx.eval([arrays(cache) for cache in caches])
        mx.clear_cache()


def arrays(cache: Any) -> list[mx.array]:
    """The arrays behind a cache, ours or mlx-lm's."""
    return [array for _, array in tree_flatten([cache.state]) if isinstance(array, mx.array)]


def nbytes(caches: list[Any]) -> int:
    """Bytes allocated by all caches."""
    return sum(cache.nbytes for cache in caches)
