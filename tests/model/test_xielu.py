"""xIELU against published vectors and float64, at the slopes that trained models have."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest

from apertus_mlx.model.apertus import XIELU

pytestmark = pytest.mark.gpu

# (stored alpha_p, stored alpha_n) -> {x: f(x)} in float64.
VECTORS = {
    (0.0, 0.0): {
        2: 3.772588722, 0.5: 0.4232867951, -0.01: -0.004940541003, -0.1: -0.04422824831,
        -0.5: -0.1228932437, -2: 0.3546220922, -8: 4.35243052,
    },
    (166.0, 40.75): {
        0.01: 0.0216, 0.5: 41.75, 2: 665, -0.001: -4.793818733e-4, -0.01: -2.944357847e-3,
        -0.1: 0.149543494, -0.5: 4.144389713, -2: 45.83258043, -8: 284.7638378,
    },
    (0.2041, -1.0469): {2: 4.201581075, -0.1: -0.04612589088, -2: -0.0907519784},
}  # fmt: skip


def activation(alpha_p: float, alpha_n: float, dtype: mx.Dtype = mx.float32) -> XIELU:
    module = XIELU()
    module.alpha_p = mx.array([alpha_p], dtype)
    module.alpha_n = mx.array([alpha_n], dtype)
    module.beta = mx.array(0.5, dtype)
    module.eps = mx.array(-1e-6, dtype)
    module.fuse(compiled=False)
    return module


def exact(x: np.ndarray, alpha_p: float, alpha_n: float, eps: float) -> np.ndarray:
    """The definition, in float64."""
    slope_p = math.log1p(math.exp(alpha_p)) if alpha_p < 20 else alpha_p
    slope_n = 0.5 + (math.log1p(math.exp(alpha_n)) if alpha_n < 20 else alpha_n)
    negative = slope_n * (np.expm1(np.minimum(x, eps)) - x)
    return np.where(x > 0, slope_p * x * x, negative) + 0.5 * x


@pytest.mark.parametrize("alphas", VECTORS)
def test_published_values(alphas: tuple[float, float]) -> None:
    points = VECTORS[alphas]
    result = activation(*alphas)(mx.array(list(points)))
    np.testing.assert_allclose(np.array(result), list(points.values()), rtol=3e-4)


@pytest.mark.parametrize("sigma", [0.02, 0.1])
def test_bfloat16_keeps_the_negative_branch(sigma: float) -> None:
    """Relative RMS error at most 0.005; in bfloat16 arithmetic it is 0.22 and 0.022."""
    x = mx.array(np.random.default_rng(0).normal(0, sigma, 100_000)).astype(mx.bfloat16)
    result = activation(166.0, 40.75, mx.bfloat16)(x)
    assert result.dtype == mx.bfloat16
    inputs = np.array(x.astype(mx.float32), np.float64)
    eps = float(mx.array(-1e-6, mx.bfloat16).astype(mx.float32).item())
    expected = exact(inputs, 166.0, 40.75, eps)
    negative = inputs <= 0
    error = np.array(result.astype(mx.float32), np.float64)[negative] - expected[negative]
    assert np.sqrt(np.mean(error**2)) <= 0.005 * np.sqrt(np.mean(expected[negative] ** 2))


def test_float16_input_overflows_only_in_its_result() -> None:
    """The square of 19 times 166 fits; in float16 arithmetic parts of it would not."""
    result = activation(166.0, 40.75)(mx.array([19.0, -300.0], mx.float16))
    expected = exact(np.array([19.0, -300.0]), 166.0, 40.75, -1e-6)
    np.testing.assert_allclose(np.array(result, np.float64), expected, rtol=1e-3)


def test_slopes_that_are_not_final_equal_final_ones() -> None:
    """Training changes the parameters; then the slopes are computed anew at each call."""
    x = mx.random.normal((64,), key=mx.random.key(0))
    folded = activation(0.3, -0.7)
    loose = XIELU()
    loose.update({"alpha_p": mx.array([0.3]), "alpha_n": mx.array([-0.7])})
    assert mx.array_equal(folded(x), loose(x))
