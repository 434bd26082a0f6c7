"""GPTQ and descent: order of the objectives, a float64 reference, and awkward inputs."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from apertus_mlx.quant import affine, descent, gptq, search
from apertus_mlx.quant.curvature import Curvature, damped
from apertus_mlx.quant.spec import AFFINE_BITS, AFFINE_GROUP_SIZES, QuantSpec

# Tiny matrices with the proportions of each projection of the family: q and o, k and v, up, down.
SHAPES = {"q": (128, 128), "k": (32, 128), "up": (256, 128), "down": (96, 256), "head": (500, 128)}


def correlated(columns: int, seed: int = 0) -> np.ndarray:
    """Second moments of inputs with a few strong directions and unequal columns."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((columns, columns)) / columns**0.5 + np.eye(columns)
    inputs = rng.standard_normal((3 * columns, columns)) @ mixing
    inputs *= np.exp(0.7 * rng.standard_normal(columns))
    return inputs.T @ inputs / len(inputs)


def curvature_of(columns: int) -> Curvature:
    return Curvature.of(correlated(columns).astype(np.float32))


def gaussian(shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) * 0.05).astype(np.float32)


def total(weight: np.ndarray, quantized: affine.AffineCodes, moments: np.ndarray) -> float:
    off = affine.dequantize(quantized).astype(np.float64) - weight
    return float(np.trace(off @ moments @ off.T))


def reference_codes(
    weight: np.ndarray, grid: affine.AffineCodes, moments: np.ndarray
) -> np.ndarray:
    """GPTQ as in the paper's section 2: after each column the rest solves least squares anew.

    In float64 and with the inverse of what remains computed afresh, not updated or factored.
    """
    left = weight.astype(np.float64)
    codes = np.zeros(weight.shape, np.uint8)
    remaining = list(np.argsort(-np.diag(moments), kind="stable"))
    top = (1 << grid.spec.bits) - 1
    while remaining:
        column = remaining[0]
        inverse = np.linalg.inv(moments[np.ix_(remaining, remaining)])
        group = column // grid.spec.group_size
        scale, bias = (a[:, group].astype(np.float64) for a in (grid.scales, grid.biases))
        code = np.clip(np.rint((left[:, column] - bias) / scale), 0, top)
        codes[:, column] = code
        error = left[:, column] - (code * scale + bias)
        left[:, remaining] -= error[:, None] * inverse[0] / inverse[0, 0]
        remaining.pop(0)
    return codes


@pytest.mark.parametrize("bits", AFFINE_BITS)
@pytest.mark.parametrize("group_size", AFFINE_GROUP_SIZES)
def test_order_of_the_methods(bits: int, group_size: int) -> None:
    spec = QuantSpec(bits, group_size)
    names = SHAPES if (bits, group_size) in ((2, 32), (3, 64)) else ("k",)
    for name in names:
        shape = SHAPES[name]
        weight, curvature = gaussian(shape), curvature_of(shape[1])
        moments = curvature.moments.astype(np.float64)
        nearest = affine.fit(weight, spec, "BF16")
        searched = search.fit(weight, spec, np.diag(moments).astype(np.float32))
        compensated = gptq.fit(weight, spec, moments, damping=0.0)
        start = search.fit_columns(weight.T, spec, curvature.diagonal, "BF16")
        rounded = gptq.round_in_order(weight.T, start, curvature)
        lowered = descent.improve(weight.T, rounded, curvature, rounds=1).as_codes()
        errors = [total(weight, q, moments) for q in (nearest, searched, compensated, lowered)]
        assert errors == sorted(errors, reverse=True), (name, errors)


@pytest.mark.parametrize(("bits", "name"), [(2, "up"), (3, "down"), (4, "k"), (8, "q")])
def test_codes_are_those_of_the_paper(bits: int, name: str) -> None:
    weight, spec = gaussian(SHAPES[name])[:16, :128], QuantSpec(bits, 32)
    curvature = curvature_of(weight.shape[1])
    grid = search.fit_columns(weight.T, spec, None, "BF16")
    moments = curvature.moments.astype(np.float64)
    expected = reference_codes(weight, grid.as_codes(), moments)
    found = gptq.round_in_order(weight.T, grid, curvature).as_codes()
    # float32 may fall on the other side of a tie, and what follows then differs.
    assert (found.codes == expected).all(axis=1).mean() >= 0.8
    objective = [
        total(weight, affine.AffineCodes(c, found.scales, found.biases, spec), moments)
        for c in (found.codes, expected)
    ]
    assert objective[0] == pytest.approx(objective[1], rel=0.01)


def test_blocks_do_not_matter() -> None:
    weight, curvature = gaussian((64, 256)), curvature_of(256)
    grid = search.fit_columns(weight.T, QuantSpec(3, 64), None, "BF16")
    codes = [
        gptq.round_in_order(weight.T, grid, curvature, block_columns=size).as_codes().codes
        for size in (1, 100, 256)
    ]
    for other in codes[1:]:
        assert (other == codes[0]).all(axis=1).mean() >= 0.9


@pytest.mark.parametrize("columns", [96, 256, 320])
def test_the_factor_beside_float64(columns: int) -> None:
    """Also where it is found in blocks."""
    moments = correlated(columns)
    curvature = Curvature.of(moments.astype(np.float32))
    expected = moments / np.diag(moments).mean() + 0.01 * np.eye(columns)
    assert np.allclose(curvature.moments, expected, atol=1e-5)
    assert (np.diff(np.diag(expected)[curvature.order]) >= -1e-6).all()
    ordered = expected[np.ix_(curvature.order, curvature.order)]
    factor = np.linalg.cholesky(ordered)
    assert np.abs(np.tril(curvature.factor) - factor).max() < 1e-4 * np.abs(factor).max()
    right = np.random.default_rng(1).standard_normal((columns, 5)).astype(np.float32)
    solved = np.linalg.solve(expected, right)
    assert np.allclose(curvature.solve(right), solved, atol=1e-3 * np.abs(solved).max())


def test_better_than_gptq_of_mlx_lm() -> None:
    compare = pytest.importorskip("mlx_lm.quant.gptq")
    nn = pytest.importorskip("mlx.nn")
    rng = np.random.default_rng(3)
    inputs = (rng.standard_normal((512, 128)) @ np.linalg.cholesky(correlated(128)).T).astype(
        np.float32
    )
    weight = gaussian((96, 128))
    linear = nn.Linear(128, 96, bias=False)
    linear.weight = mx.array(weight)
    model, _ = compare.gptq_quantize(nn.Sequential(linear), mx.array(inputs)[None], 2, 64, 2, 64)
    theirs = model.layers[0]
    scales, biases = (
        a.astype(mx.bfloat16).astype(mx.float32) for a in (theirs.scales, theirs.biases)
    )
    off = np.array(mx.dequantize(theirs.weight, scales, biases, bits=2, group_size=64)) - weight
    moments = inputs.T @ inputs / len(inputs)
    ours = gptq.fit(weight, QuantSpec(2, 64), moments)
    assert total(weight, ours, moments) < 0.9 * np.trace(off @ moments @ off.T)


@pytest.mark.parametrize("seen", [0, 1, 5])
def test_too_few_inputs_still_give_an_answer(seen: int) -> None:
    inputs = np.random.default_rng(0).standard_normal((seen, 128))
    weight = gaussian((16, 128))
    quantized = gptq.fit(weight, QuantSpec(4, 64), inputs.T @ inputs)
    assert np.isfinite(affine.dequantize(quantized)).all()
    assert np.abs(affine.dequantize(quantized) - weight).max() < 0.2


def test_dead_columns_are_rounded() -> None:
    moments = correlated(128)
    moments[7] = moments[:, 7] = 0
    weight = gaussian((16, 128))
    quantized = gptq.fit(weight, QuantSpec(6, 64), moments)
    off = np.abs(affine.dequantize(quantized) - weight)[:, 7]
    assert (off <= 0.51 * quantized.scales[:, 0] + 1e-3).all()


def test_indefinite_moments_are_damped_until_they_factor() -> None:
    moments = correlated(64)
    moments -= 0.5 * np.diag(moments).mean() * np.eye(64)
    moments[np.diag_indices(64)] = np.abs(np.diag(moments))
    np.linalg.cholesky(damped(moments))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_moments_that_are_not_finite_are_refused(value: float) -> None:
    moments = correlated(64)
    moments[3, 4] = value
    with pytest.raises(ValueError, match="not finite"):
        gptq.fit(gaussian((8, 64)), QuantSpec(4, 64), moments)


@pytest.mark.parametrize("bits", [2, 4])
def test_no_single_code_and_no_scale_can_be_better(bits: int) -> None:
    """After many rounds: beside all neighbours of each code, and least squares in float64."""
    weight, spec, curvature = gaussian((3, 128)), QuantSpec(bits, 64), curvature_of(128)
    moments = curvature.moments.astype(np.float64)
    start = search.fit_columns(weight.T, spec, None, "F32")
    found = descent.improve(weight.T, start, curvature, "F32", rounds=40).as_codes()
    off = affine.dequantize(found).astype(np.float64) - weight
    slope = off @ moments
    for step in (-1, 1):
        moved = step * np.repeat(found.scales, 64, axis=1)
        change = 2 * moved * slope + moved**2 * np.diag(moments)
        codes = found.codes.astype(int) + step
        possible = (codes >= 0) & (codes < 1 << bits)
        assert change[possible].min() > -1e-5 * np.einsum("rc,rc->r", slope, off).max()
    root = np.linalg.cholesky(moments).T
    for row in range(3):
        design = np.zeros((128, 4))
        for group in range(2):
            part = slice(64 * group, 64 * group + 64)
            design[part, group], design[part, 2 + group] = found.codes[row, part], 1
        best, *_ = np.linalg.lstsq(root @ design, root @ weight[row], rcond=None)
        assert np.allclose(found.scales[row], best[:2], rtol=2e-2)
        assert np.allclose(found.biases[row], best[2:], rtol=5e-2, atol=2e-3)


@pytest.mark.parametrize(("bits", "name"), [(2, "k"), (4, "down")])
def test_mlx_and_numpy_agree(bits: int, name: str) -> None:
    """All of a fit in both libraries, in float32: objectives within 0.5 %, nearly all codes."""
    shape, spec = SHAPES[name], QuantSpec(bits, 64)
    missing = 0.02 * gaussian((shape[1], shape[0]), seed=2)
    results = []
    for array in (np.array, mx.array):
        curvature = Curvature.of(array(correlated(shape[1]).astype(np.float32)))
        target = array(gaussian(shape).T) + curvature.solve(array(missing))
        found = search.fit_columns(target, spec, curvature.diagonal, "BF16")
        found = gptq.round_in_order(target, found, curvature)
        found = descent.improve(target, found, curvature)
        results.append(found.as_codes())
    moments = damped(correlated(shape[1]))
    wanted = (gaussian(shape).T + np.linalg.solve(moments, missing)).T.astype(np.float32)
    errors = [total(wanted, result, moments) for result in results]
    assert errors[1] == pytest.approx(errors[0], rel=0.005)
    assert (results[0].codes == results[1].codes).mean() >= 0.9
