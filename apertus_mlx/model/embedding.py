"""One row of a quantized embedding in one kernel, where gathering its parts takes four.

The row is a product of 1 with a matrix of that one row. MLX's kernel for it is made for larger
matrices, so it is tried once before it is used.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import TypeGuard

import mlx.core as mx
import mlx.nn as nn

_log = logging.getLogger(__name__)


class ProductEmbedding(nn.QuantizedEmbedding):
    """An affinely quantized embedding, with its arrays, that looks up a single token by product."""

    def __init__(self, embedding: nn.QuantizedEmbedding) -> None:
        nn.Module.__init__(self)
        vars(self).update(vars(embedding))
        dict.update(self, embedding)

    def __call__(self, x: mx.array) -> mx.array:
        """Rows `[..., D]` of the token ids `x`."""
        if x.size != 1:
            rows: mx.array = super().__call__(x)
            return rows
        parts = (self[name] for name in ("weight", "scales", "biases"))
        codes, scales, biases = (part.reshape(-1, 1, part.shape[1]) for part in parts)
        one, zero = _unit(scales.dtype)
        product = mx.gather_qmm(
            one, codes, scales, biases, lhs_indices=zero, rhs_indices=x.reshape(1),
            transpose=False, group_size=self.group_size, bits=self.bits,
        )  # fmt: skip
        return product.reshape(*x.shape, -1)

    @classmethod
    def is_exact(cls, embedding: nn.Module) -> TypeGuard[nn.QuantizedEmbedding]:
        """Whether it can be used: of some tokens it has given what `embedding` itself gives."""
        if type(embedding) is not nn.QuantizedEmbedding or embedding.mode != "affine":
            return False
        by_product = cls(embedding)
        last = embedding.weight.shape[0] - 1
        for token in (mx.array([value], mx.uint32) for value in (0, last // 2, last)):
            expected = embedding(token).reshape(-1).astype(mx.float32)
            found = by_product(token).reshape(-1).astype(mx.float32)
            # The product is rounded once, the embedding's own row may be twice.
            margin = mx.finfo(embedding.scales.dtype).eps * mx.max(mx.abs(expected))
            if not mx.all(mx.abs(found - expected) <= margin).item():
                _log.warning(
                    "MLX's fast product with one row of the embedding is wrong here; a slower way "
                    "is taken"
                )
                return False
        return True


@cache
def _unit(dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    """A matrix of a single 1, and an index of 0."""
    unit = mx.ones((1, 1), dtype), mx.zeros((1,), mx.uint32)
    mx.eval(unit)
    return unit
