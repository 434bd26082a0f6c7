"""Attention and xIELU by NumPy, and their gradients: beside MLX's own."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from apertus_mlx.convert.evaluation.numpy_operations import (
    causal_attention,
    learning_xielu,
    xielu,
)
from apertus_mlx.model import apertus


def close(found: list[mx.array], expected: list[mx.array]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        error = float(mx.abs(one - other).max())
        assert error < 1e-5 * max(float(mx.abs(other).max()), 0.1)


@pytest.mark.parametrize("length", [1, 5, 128, 300])
def test_attention(length: int) -> None:
    """Two and four heads for each head of keys; lengths within and across blocks of queries."""
    draw = np.random.default_rng(length)
    queries, keys = (2, 4, length, 16), (2, 2 if length < 300 else 1, length, 16)
    shapes = (queries, keys, keys, queries)
    arrays = [mx.array(draw.standard_normal(shape, np.float32)) for shape in shapes]

    def expected(*inputs: mx.array) -> mx.array:
        return mx.fast.scaled_dot_product_attention(*inputs, scale=0.3, mask="causal")

    *inputs, cotangent = arrays
    results = [
        mx.vjp(function, inputs, [cotangent]) for function in (causal_attention(0.3), expected)
    ]
    close(*(output + gradients for output, gradients in results))


def test_xielu() -> None:
    """Slopes from flat to those of trained models, values around zero and far from it."""
    draw = np.random.default_rng(0)
    x = mx.array(np.concatenate([draw.standard_normal(70_000) * 3, [0.0, -1e-3, 1e-3, -40.0]]))
    x, cotangent = x.astype(mx.float32).reshape(2, -1), mx.ones((2, 35_002))
    for slopes in ((0.8, 0.8, 0.5, -1e-6), (170.0, 90.5, 0.5, -1e-6), (0.0, 0.5, 0.5, -1e-6)):
        arrays = [mx.array(slope) for slope in slopes]

        def expected(x: mx.array, arrays: list[Any] = arrays) -> mx.array:
            return apertus.xielu(x, *arrays)

        results = [mx.vjp(function, [x], [cotangent]) for function in (xielu(*slopes), expected)]
        found, wanted = (output + gradients for output, gradients in results)
        # There alone MLX's gradient jumps.
        at_zero = x == 0
        found[1], wanted[1] = (mx.where(at_zero, 0, array) for array in (found[1], wanted[1]))
        close(found, wanted)


def test_slopes_of_xielu_learn() -> None:
    draw = np.random.default_rng(1)
    x, cotangent = (mx.array(draw.standard_normal((3, 500), np.float32) * 2) for _ in range(2))
    for slopes in ((0.8, 0.8), (170.0, 90.5)):
        inputs = [x, *(mx.array([slope]) for slope in slopes)]

        def expected(*arrays: mx.array) -> mx.array:
            return apertus.xielu(*arrays, mx.array(0.5), mx.array(-1e-6))

        results = [
            mx.vjp(function, inputs, [cotangent])
            for function in (learning_xielu(0.5, -1e-6), expected)
        ]
        close(*(output + gradients for output, gradients in results))
