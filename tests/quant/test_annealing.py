"""Annealing: beyond the minimum that descent rests in, judged in float64; both libraries alike."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from apertus_mlx.quant import affine, annealing, descent, search
from apertus_mlx.quant.arrays import Array
from apertus_mlx.quant.columns import Columns
from apertus_mlx.quant.curvature import Curvature
from apertus_mlx.quant.spec import QuantSpec
from tests.quant.test_gptq import correlated, gaussian

# More columns than are taken up at once.
ROWS, COLUMNS = 64, 320


def at_rest(
    spec: QuantSpec, library: type = np.ndarray, rounds: int = 40
) -> tuple[Array, Columns, Curvature]:
    """A target, codes for it that descent cannot lower any more, and the curvature."""
    array = np.array if library is np.ndarray else mx.array
    curvature = Curvature.of(array(correlated(COLUMNS).astype(np.float32)))
    target = array(np.ascontiguousarray(gaussian((ROWS, COLUMNS)).T))
    start = search.fit_columns(target, spec, curvature.diagonal, "BF16")
    return target, descent.improve(target, start, curvature, rounds=rounds), curvature


def errors(found: Columns, curvature: Curvature) -> np.ndarray:
    """The objective of each row in float64, from what would be stored."""
    off = affine.dequantize(found.as_codes()).astype(np.float64) - gaussian((ROWS, COLUMNS))
    return np.einsum("rc,cd,rd->r", off, np.array(curvature.moments, np.float64), off)


@pytest.mark.parametrize("bits", [2, 3])
def test_it_goes_below_where_descent_rests(bits: int) -> None:
    target, start, curvature = at_rest(QuantSpec(bits, 64))
    found = annealing.anneal(target, start, curvature)
    more = descent.improve(target, start, curvature, rounds=40)
    before, after, beside = (errors(each, curvature) for each in (start, found, more))
    assert (after <= before * (1 + 1e-5)).all()
    assert after.sum() < 0.97 * min(before.sum(), beside.sum())


def test_both_libraries_leave_as_much() -> None:
    """Their noise differs, so codes do; the objectives of many rows together hardly do."""
    sums = []
    for library in (np.ndarray, mx.array):
        target, start, curvature = at_rest(QuantSpec(2, 64), library, rounds=1)
        found = annealing.anneal(target, start, curvature, rounds=2, visits=3)
        sums.append(errors(found, curvature).sum())
        assert sums[-1] < 0.99 * errors(start, curvature).sum()
    assert sums[1] == pytest.approx(sums[0], rel=0.02)


def test_it_draws_the_same_each_time() -> None:
    target, start, curvature = at_rest(QuantSpec(2, 64))
    first, second = (annealing.anneal(target, start, curvature).as_codes() for _ in range(2))
    assert np.array_equal(first.codes, second.codes)
    assert np.array_equal(first.scales, second.scales)


def test_a_perfect_start_stays() -> None:
    """Weights that the format has exactly: nothing is better, and no row is made worse."""
    spec, (_, start, curvature) = QuantSpec(2, 64), at_rest(QuantSpec(2, 64))
    target = start.values()
    found = annealing.anneal(target, start, curvature)
    assert np.array_equal(found.codes, start.codes)
    assert found.spec == spec
