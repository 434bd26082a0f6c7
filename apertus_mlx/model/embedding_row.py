"""One row of a quantized embedding in one kernel, where gathering its parts takes four.

The row is a product of 1 with a matrix of that one row. MLX's kernel for it is made for larger
matrices, so it is tried once before it is used.
"""

from __future__ import annotations

import logging
from functools import cache

import mlx.core as mx
import mlx.nn as nn

_log = logging.getLogger(__name__)


def row(embedding: nn.Module, token: mx.array) -> mx.array:
    """The row of `token` (of any shape with one element), `[1, 1, D]`."""
    codes, scales, biases = (
        embedding[name].reshape(-1, 1, embedding[name].shape[1])
        for name in ("weight", "scales", "biases")
    )
    one, zero = _unit(scales.dtype)
    product = mx.gather_qmm(
        one, codes, scales, biases, lhs_indices=zero, rhs_indices=token.reshape(1),
        transpose=False, group_size=embedding.group_size, bits=embedding.bits,
    )  # fmt: skip
    return product.reshape(1, 1, -1)


def works(embedding: nn.Module) -> bool:
    """Whether `row` can be used: of some tokens it has given what the embedding itself gives."""
    if not isinstance(embedding, nn.QuantizedEmbedding) or embedding.mode != "affine":
        return False
    last = embedding.weight.shape[0] - 1
    for token in (mx.array([value], mx.uint32) for value in (0, last // 2, last)):
        expected = embedding(token).reshape(-1).astype(mx.float32)
        found = row(embedding, token).reshape(-1).astype(mx.float32)
        # The product is rounded once, the embedding's own row may be twice.
        margin = mx.finfo(embedding.scales.dtype).eps * mx.max(mx.abs(expected))
        if not mx.all(mx.abs(found - expected) <= margin).item():
            _log.warning("MLX's product with one row is wrong here; embedding rows are gathered")
            return False
    return True


@cache
def _unit(dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    """A matrix of a single 1, and an index of 0."""
    unit = mx.ones((1, 1), dtype), mx.zeros((1,), mx.uint32)
    mx.eval(unit)
    return unit
