"""Weights of the CPU path: repacking, and products with them, against float64."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from apertus_mlx.checkpoint.config import parse_config
from apertus_mlx.quant.spec import AFFINE_BITS, AFFINE_GROUP_SIZES
from tests.builders import config_4x

pytest.importorskip("onnxruntime")
from apertus_mlx.backend.cpu.stage import Stage
from apertus_mlx.backend.cpu.weights import Activations, Dense, Quantized, Weight, pack, stack

CONFIG = parse_config(config_4x())
# Largest error of a product with activations rounded to 8 bits, as a share of its norm.
ERROR = {"float32": 2e-6, "int8": 2e-2}


def quantized(
    rows: int, columns: int, bits: int, group_size: int, activations: Activations
) -> tuple[Quantized, np.ndarray]:
    """A packed random matrix, and what MLX says its values are."""
    values = mx.random.normal((rows, columns), key=mx.random.key(bits * group_size))
    words, scales, biases = mx.quantize(values, group_size, bits)
    packed = pack(
        np.array(words), np.array(scales), np.array(biases), bits, group_size, activations
    )
    return packed, np.array(mx.dequantize(words, scales, biases, group_size, bits), np.float64)


def nibbles(weight: Quantized) -> np.ndarray:
    """The matrix that planes, zeros and offsets stand for, unpacked bit by bit."""
    total = np.zeros((weight.rows, weight.columns))
    if weight.offsets is not None:
        total += np.repeat(weight.offsets.T.astype(np.float64), weight.group_size, axis=1)
    groups = weight.columns // weight.group_size
    for plane in weight.planes:
        codes = numbers(plane.codes.reshape(weight.rows, -1), plane.bits)
        zeros = np.full((weight.rows, groups), 2 ** (plane.bits - 1))
        if plane.zeros is not None:
            zeros = numbers(plane.zeros, plane.bits)[:, :groups]
        wide_zeros, wide_scales = (
            np.repeat(array.astype(np.float64), weight.group_size, axis=1)
            for array in (zeros, plane.scales)
        )
        total += (codes - wide_zeros) * wide_scales
    return total


def numbers(stream: np.ndarray, bits: int) -> np.ndarray:
    """Each row's numbers of so many bits."""
    flat = np.unpackbits(stream, axis=1, bitorder="little")
    return flat.reshape(len(stream), -1, bits) @ (1 << np.arange(bits))


def multiply(x: np.ndarray, weight: Weight) -> np.ndarray:
    """`x` times the transposed matrix, by onnxruntime."""
    stage = Stage(CONFIG)
    stage.output(stage.product(stage.input("x", x.shape[1]), weight))
    return stage.session()({"x": x})[0]


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("activations", ["float32", "int8"])
@pytest.mark.parametrize("group_size", AFFINE_GROUP_SIZES)
@pytest.mark.parametrize("bits", AFFINE_BITS)
def test_packed_values_are_those_of_mlx(
    bits: int, group_size: int, activations: Activations
) -> None:
    weight, expected = quantized(24, 384, bits, group_size, activations)
    assert weight.columns == 384 and weight.rows == 24
    np.testing.assert_allclose(nibbles(weight), expected, rtol=0, atol=2e-6)


def test_four_bits_are_not_copied() -> None:
    words = np.zeros((8, 16), np.uint32)
    scales = np.ones((8, 2), np.float32)
    assert np.shares_memory(pack(words, scales, scales, 4, 64, "int8").planes[0].codes, words)


def test_repacking_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apertus_mlx.backend.cpu.weights.BLOCK_CODES", 1000)
    weight, expected = quantized(24, 384, 3, 64, "float32")
    np.testing.assert_allclose(nibbles(weight), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("activations", ["float32", "int8"])
@pytest.mark.parametrize("group_size", AFFINE_GROUP_SIZES)
@pytest.mark.parametrize("bits", AFFINE_BITS)
def test_products(bits: int, group_size: int, activations: Activations) -> None:
    # 13 and 67 rows: no multiple of any kernel's tile.
    weight, values = quantized(67, 256, bits, group_size, activations)
    rng = np.random.default_rng(bits)
    for rows in (1, 2, 3, 17, 64, 600):
        x = rng.standard_normal((rows, 256), np.float32) + np.float32(0.5)
        error = distance(multiply(x, weight), x @ values.T)
        assert error < ERROR[activations], (rows, error)


def test_products_of_columns_that_are_few() -> None:
    weight, values = quantized(5, 32, 4, 32, "float32")
    x = np.ones((1, 32), np.float32)
    assert distance(multiply(x, weight), x @ values.T) < 1e-6


def test_dense_product() -> None:
    rng = np.random.default_rng(0)
    values, x = rng.standard_normal((67, 96), np.float32), rng.standard_normal((17, 96), np.float32)
    assert distance(multiply(x, Dense(values)), x.astype(np.float64) @ values.T) < 1e-6


def test_stacking_joins_equal_forms_only() -> None:
    a, values_a = quantized(16, 128, 4, 64, "float32")
    b, values_b = quantized(8, 128, 4, 64, "float32")
    other_group, _ = quantized(8, 128, 4, 32, "float32")
    two_planes, _ = quantized(8, 128, 8, 32, "float32")
    dense = Dense(np.zeros((8, 128), np.float32))
    (joined,) = stack([a, b])
    assert isinstance(joined, Quantized)
    np.testing.assert_allclose(nibbles(joined), np.concatenate([values_a, values_b]), atol=1e-6)
    assert len(stack([a, other_group, b])) == 3
    assert len(stack([other_group, two_planes, dense, dense])) == 3


@pytest.mark.parametrize("slopes", [(0.8, 0.8), (166.0, 40.75)])
def test_xielu(slopes: tuple[float, float]) -> None:
    """Against the definition in float64, without eps; small inputs lose nothing."""
    alpha_p, alpha_n = slopes
    beta = 0.5
    x = np.concatenate([sign * np.logspace(-5, 2, 400) for sign in (1, -1)])[None]
    x = x.astype(np.float32)
    wide = x.astype(np.float64)
    positive = alpha_p * wide**2
    negative = alpha_n * (np.expm1(np.minimum(wide, 0)) - wide)
    expected = np.where(wide > 0, positive, negative) + beta * wide
    stage = Stage(CONFIG)
    stage.output(stage.xielu(stage.input("x", x.shape[1]), alpha_p, alpha_n, beta))
    found = stage.session()({"x": x})[0]
    bound = 4e-7 * (alpha_n + alpha_p * np.abs(wide) + 1) * np.abs(wide)
    assert np.all(np.abs(found - expected) <= bound)
