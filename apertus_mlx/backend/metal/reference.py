"""Quantized weights for trials of kernels, and their arithmetic in float64."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from apertus_mlx.backend.metal.kernel import Exact
from apertus_mlx.quant.packing import unpack

# Weights that are unpacked at a time: 32 MB in float64.
BLOCK = 2**22


def float64(values: mx.array) -> Exact:
    """`values` of any type and shape, exactly."""
    exact = values.astype(mx.float32) if values.dtype in (mx.float16, mx.bfloat16) else values
    return np.array(exact).astype(np.float64)


def random_weights(
    rows: int, columns: int, bits: int, group_size: int, dtype: mx.Dtype, key: mx.array
) -> list[mx.array]:
    """Words, scales and biases of a matrix whose products with normal vectors are about normal."""
    keys = mx.random.split(key, 3)
    words = mx.random.randint(0, 2**16, (2, rows, columns * bits // 32), mx.uint32, keys[0])
    # Codes are uniform: their deviation is 2^bits / sqrt(12).
    usual = 12**0.5 / 2**bits / columns**0.5
    scales = usual * mx.random.uniform(0.5, 1.5, (rows, columns // group_size), key=keys[1])
    centres = mx.random.uniform(0.4, 0.6, (rows, columns // group_size), key=keys[2])
    biases = -scales * centres * (2**bits - 1)
    return [words[0] << 16 | words[1], scales.astype(dtype), biases.astype(dtype)]


def product(words: mx.array, scales: mx.array, biases: mx.array, bits: int, vector: Exact) -> Exact:
    """The matrix times `vector` `[columns]`: `[rows]`."""
    (columns,) = vector.shape
    rows, step = words.shape[0], max(1, BLOCK // columns)
    exact = np.empty(rows)
    for i in range(0, rows, step):
        block = slice(i, i + step)
        codes = unpack(np.array(words[block]), bits, columns).astype(np.float64)
        grouped = codes.reshape(len(codes), scales.shape[1], -1)
        grouped *= float64(scales[block])[:, :, None]
        grouped += float64(biases[block])[:, :, None]
        exact[block] = grouped.reshape(-1, columns) @ vector
    return exact


def rms_norm(values: Exact, weight: mx.array, eps: float) -> Exact:
    """RMSNorm over the last axis."""
    mean = np.mean(values * values, axis=-1, keepdims=True)
    normed: Exact = values / np.sqrt(mean + eps) * float64(weight)
    return normed


def xielu(values: Exact, alpha_p: float, alpha_n: float, beta: float, eps: float) -> Exact:
    """Activation by xIELU with final slopes."""
    negative = alpha_n * (np.expm1(np.minimum(values, eps)) - values)
    return np.where(values > 0, alpha_p * values * values, negative) + beta * values
