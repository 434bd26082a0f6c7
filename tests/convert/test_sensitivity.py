"""Divergences of formats that are not measured follow from the sizes of their errors."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from apertus_mlx.convert.calibration import sensitivity
from apertus_mlx.quant.spec import QuantSpec

FORMATS = tuple(QuantSpec(bits, group) for bits in (2, 4, 6, 8) for group in (32, 64))


def by_mlx(weight: np.ndarray, spec: QuantSpec) -> np.ndarray:
    codes = mx.quantize(mx.array(weight), spec.group_size, spec.bits)
    return np.array(mx.dequantize(*codes, spec.group_size, spec.bits))


def test_sizes_of_few_rows_stand_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all rows they are the sums in float64; of some, nearly the same shares."""
    draw = np.random.default_rng(0)
    weight = (0.02 * draw.standard_normal((512, 128))).astype(np.float32)
    squares = np.exp(draw.standard_normal(128))
    roundings = {
        spec: lambda rows, _, spec=spec: by_mlx(rows, spec) for spec in FORMATS
    }  # fmt: skip
    few = sensitivity._sizes(weight, roundings, squares)
    monkeypatch.setattr(sensitivity, "SIZE_ROWS", 1 << 20)
    found = sensitivity._sizes(weight, roundings, squares)
    for spec in FORMATS:
        error = by_mlx(weight, spec).astype(np.float64) - weight
        assert found[spec] == pytest.approx((error**2 * squares).sum(), rel=1e-5)
    for spec in FORMATS[1:]:
        share = few[spec] / few[FORMATS[0]]
        assert share == pytest.approx(found[spec] / found[FORMATS[0]], rel=0.15)
