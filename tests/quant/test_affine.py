"""The affine format: laws of rounding, and agreement with MLX about what codes mean."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from apertus_mlx.quant import affine, search
from apertus_mlx.quant.spec import AFFINE_BITS, AFFINE_GROUP_SIZES, QuantSpec

weights = arrays.arrays(
    np.float32, (2, 64), elements=st.floats(-(2.0**40), 2.0**40, width=32, allow_subnormal=False)
)
specs = st.builds(QuantSpec, st.sampled_from(AFFINE_BITS), st.sampled_from((32, 64)))


def half_steps(quantized: affine.AffineCodes) -> np.ndarray:
    return np.repeat(quantized.scales.astype(np.float64), quantized.spec.group_size, axis=1) / 2


def exact(quantized: affine.AffineCodes) -> np.ndarray:
    """What the codes stand for, in float64."""
    repeat = quantized.spec.group_size
    scales, biases = (
        np.repeat(a.astype(np.float64), repeat, axis=1)
        for a in (quantized.scales, quantized.biases)
    )
    return quantized.codes * scales + biases


@settings(deadline=None, max_examples=40)
@given(weights, specs)
def test_no_weight_is_off_by_more_than_half_a_step(weight: np.ndarray, spec: QuantSpec) -> None:
    quantized = affine.fit(weight, spec)
    off = np.abs(exact(quantized) - weight)
    assert (off <= half_steps(quantized) * (1 + 1e-9)).all()


@settings(deadline=None, max_examples=40)
@given(weights, specs)
def test_zero_stays_zero(weight: np.ndarray, spec: QuantSpec) -> None:
    weight = weight.copy()
    weight[:, ::7] = 0
    assert (affine.dequantize(affine.fit(weight, spec))[:, ::7] == 0).all()


def zero_is_half_way(weight: np.ndarray, spec: QuantSpec) -> bool:
    """Whether zero lies between two codes in some group, so that both ends may round inwards."""
    groups = weight.reshape(-1, spec.group_size).astype(np.float64)
    lowest = np.minimum(groups.min(-1), 0)
    spread = np.maximum(np.maximum(groups.max(-1), 0) - lowest, 1e-300)
    position = -lowest / spread * (2**spec.bits - 1)
    return bool((np.abs(position % 1 - 0.5) < 1e-3).any())


@settings(deadline=None, max_examples=40)
@given(weights, specs)
def test_quantizing_again_changes_nothing(weight: np.ndarray, spec: QuantSpec) -> None:
    assume(not zero_is_half_way(weight, spec))
    once = affine.dequantize(affine.fit(weight, spec))
    assert np.array_equal(affine.dequantize(affine.fit(once, spec)), once)


@pytest.mark.parametrize("bits", AFFINE_BITS)
@pytest.mark.parametrize("group_size", AFFINE_GROUP_SIZES)
def test_mlx_reads_the_codes_as_meant(bits: int, group_size: int) -> None:
    spec = QuantSpec(bits, group_size)
    weight = np.random.default_rng(bits).standard_normal((6, 256)).astype(np.float32)
    for quantized in (affine.fit(weight, spec), search.fit(weight, spec)):
        found = mx.dequantize(
            mx.array(quantized.packed), mx.array(quantized.scales), mx.array(quantized.biases),
            group_size=group_size, bits=bits,
        )  # fmt: skip
        # MLX may fuse the multiplication with the addition.
        assert np.allclose(np.array(found), affine.dequantize(quantized), rtol=1e-6, atol=1e-6)


def test_rounding_to_stored_types_is_that_of_mlx() -> None:
    values = np.random.default_rng(0).standard_normal(4096).astype(np.float32) * 100
    values[:4] = [0, -0.0, 1 + 2**-8, 1 + 3 * 2**-8]
    for name, dtype in (("BF16", mx.bfloat16), ("F16", mx.float16)):
        expected = np.array(mx.array(values).astype(dtype).astype(mx.float32))
        assert np.array_equal(affine.round_scales(values, name), expected)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(value: float) -> None:
    weight = np.zeros((2, 64), np.float32)
    weight[1, 5] = value
    for fit in (affine.fit, search.fit):
        with pytest.raises(ValueError, match="not finite"):
            fit(weight, QuantSpec(4, 64))


def test_rows_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="divide"):
        affine.fit(np.zeros((2, 96), np.float32), QuantSpec(4, 64))


@pytest.mark.parametrize("bits", AFFINE_BITS)
def test_flat_and_lonely_groups(bits: int) -> None:
    weight = np.zeros((6, 64), np.float32)
    weight[1] = 0.625
    weight[2] = -0.625
    weight[3, 10] = 1000
    weight[4, 10] = -1e-30
    weight[5, ::2] = 1e30
    for fit in (affine.fit, search.fit):
        quantized = fit(weight, QuantSpec(bits, 64), scale_type="BF16")
        found = affine.dequantize(quantized)
        assert np.isfinite(found).all() and (quantized.scales > 0).all()
        # bfloat16 scales are good to one part in 256 of the largest weight.
        largest = np.abs(weight).max(1, keepdims=True)
        assert (np.abs(found - weight) <= largest * 2**-7).all()


@pytest.mark.parametrize("bits", AFFINE_BITS)
def test_search_beats_rounding_and_mlx(bits: int) -> None:
    rng = np.random.default_rng(bits)
    weight = (rng.standard_t(5, (64, 256)) * 0.05).astype(np.float32)
    stored = np.array(mx.array(weight).astype(mx.bfloat16).astype(mx.float32))
    spec = QuantSpec(bits, 64)
    codes, scales, biases = mx.quantize(mx.array(stored).astype(mx.bfloat16), bits=bits)
    theirs = mx.dequantize(codes, scales.astype(mx.float32), biases.astype(mx.float32), bits=bits)
    theirs_error = np.square(np.array(theirs) - stored).sum()
    found = search.fit(stored, spec)
    nearest = affine.fit(stored, spec, "BF16")
    errors = [np.square(affine.dequantize(q) - stored).sum(-1) for q in (found, nearest)]
    assert (errors[0] <= errors[1]).all()
    assert errors[0].sum() < theirs_error * (0.8 if bits <= 3 else 0.95)


def test_search_weighs_columns_by_their_input() -> None:
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((32, 128)).astype(np.float32)
    moments = np.exp(2 * rng.standard_normal(128)).astype(np.float32)
    spec = QuantSpec(2, 64)

    def error(quantized: affine.AffineCodes) -> float:
        return float((np.square(affine.dequantize(quantized) - weight) * moments).sum())

    assert error(search.fit(weight, spec, moments)) < 0.8 * error(search.fit(weight, spec))
    with pytest.raises(ValueError, match="moments"):
        search.fit(weight, spec, -moments)


def test_scales_are_those_that_will_be_stored() -> None:
    weight = np.random.default_rng(2).standard_normal((8, 128)).astype(np.float32)
    for name in ("BF16", "F16"):
        quantized = search.fit(weight, QuantSpec(3, 32), scale_type=name)
        for values in (quantized.scales, quantized.biases):
            assert np.array_equal(affine.round_scales(values, name), values)
