"""A quantized product with a factor that MLX's format has no place for.

FP8 and NVFP4 checkpoints keep one scale per row or per matrix beside their codes; the codes are
kept exactly, and the factor is applied to the product.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn


class ScaledLinear(nn.Module):
    """`factor * linear(x)`; `factor` in float32, of shape `[1]` or with one entry per output."""

    def __init__(self, linear: nn.Module, factor: mx.array) -> None:
        super().__init__()
        self.linear = linear
        self.factor = factor

    def __call__(self, x: mx.array) -> mx.array:
        """Apply to `x` `[..., in]`; returns `[..., out]` in the type of `x`."""
        product: mx.array = self.linear(x)
        return (product * self.factor).astype(x.dtype)
