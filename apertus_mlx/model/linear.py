"""Products that are not one plain matrix: several joined to one, and one with a factor."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

import mlx.core as mx
import mlx.nn as nn


def join(projections: Sequence[nn.Module]) -> nn.Module | None:
    """One projection whose outputs are those of `projections` one after the other.

    Each output has its own row of weights, so the numbers stay the same. None where the formats
    differ, or where a projection is more than a product.
    """
    first = projections[0]
    plain = all(type(projection) is nn.Linear for projection in projections)
    quantized = all(type(projection) is nn.QuantizedLinear for projection in projections)
    if not plain and not quantized:
        return None
    if quantized and len({(p.bits, p.group_size, p.mode) for p in projections}) > 1:
        return None
    # Of the same class, with the same settings, and with other arrays.
    joined = copy(first)
    names = [name for name in ("weight", "scales", "biases") if first.get(name) is not None]
    for name in names:
        joined[name] = mx.concatenate([projection[name] for projection in projections])
        mx.eval(joined[name])
    return joined


class ScaledLinear(nn.Module):
    """`factor * linear(x)`; `factor` in float32, of shape `[1]` or with one entry per output.

    FP8 and NVFP4 checkpoints keep one scale per row or per matrix beside their codes, for which
    MLX's format has no place. The codes are kept exactly, and the product is multiplied.
    """

    def __init__(self, linear: nn.Module, factor: mx.array) -> None:
        super().__init__()
        self.linear = linear
        self.factor = factor

    def __call__(self, x: mx.array) -> mx.array:
        """Apply to `x` `[..., in]`; returns `[..., out]` in the type of `x`."""
        product: mx.array = self.linear(x)
        return (product * self.factor).astype(x.dtype)
