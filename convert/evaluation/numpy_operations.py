"""Causal attention and xIELU in float32 that gradients pass, by NumPy for machines without a GPU.

MLX's own on the CPU take some ten times as long. Both work on pieces that stay in a core's cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from apertus_mlx.model.apertus import DecoderLayer
from apertus_mlx.quant.arrays import Float32, blocks

# Queries of each head that attend at once.
BLOCK_QUERIES = 128
# Numbers that the activation is applied to at once.
BLOCK_NUMBERS = 1 << 15
# From here to zero `expm1(y) - y` is a series; its factors of y to the power of 8, 7 and so on.
NEAR = -0.5
SERIES = tuple(1 / math.factorial(power) for power in range(8, 1, -1))

_Operation = Callable[..., mx.array]


def causal_attention(scale: float) -> _Operation:
    """Attention of queries `[B, heads, L, D]` to keys and values `[B, kv_heads, L, D]`.

    What it returns is shaped like the queries.
    """

    def forward(*inputs: mx.array) -> mx.array:
        queries, keys, values = map(_view, inputs)
        output = np.empty_like(queries)
        for where, seen in _pieces(queries, keys):
            weights = _weights(queries[where], keys[seen], scale)
            output[where] = (weights @ values[seen]).reshape(output[where].shape)
        return mx.array(output)

    def backward(
        inputs: Sequence[mx.array], cotangent: mx.array, result: mx.array
    ) -> tuple[mx.array, ...]:
        queries, keys, values = map(_view, inputs)
        slopes, outputs = _view(cotangent), _view(result)
        found = [np.zeros_like(array) for array in (queries, keys, values)]
        for where, seen in _pieces(queries, keys):
            weights = _weights(queries[where], keys[seen], scale)
            slope = slopes[where].reshape(len(weights), -1)
            found[2][seen] += weights.T @ slope
            pulled = slope @ values[seen].T
            pulled -= (slopes[where] * outputs[where]).sum(-1).reshape(-1, 1)
            pulled *= weights
            pulled *= scale
            found[0][where] = (pulled @ keys[seen]).reshape(slopes[where].shape)
            found[1][seen] += pulled.T @ queries[where].reshape(len(weights), -1)
        return tuple(map(mx.array, found))

    return _with_gradient(forward, backward)


def compute_here(layer: DecoderLayer) -> None:
    """Have the attention and the activation of `layer` computed by this module.

    Its slopes are those that it has now; they do not learn.
    """
    attention = causal_attention(layer.self_attn.scale)

    def attend(queries: mx.array, keys: mx.array, values: mx.array, _: Any) -> mx.array:
        heads = attention(queries, keys, values)
        batch, _, length, _ = heads.shape
        return heads.transpose(0, 2, 1, 3).reshape(batch, length, -1)

    slopes = [np.array(slope).item() for slope in layer.mlp.act_fn.slopes()]
    setattr(layer.self_attn, "attend", attend)  # noqa: B010 - a method, for this layer alone
    setattr(layer.mlp, "act_fn", xielu(*slopes))  # noqa: B010 - likewise


def xielu(alpha_p: float, alpha_n: float, beta: float, eps: float) -> _Operation:
    """The activation with final slopes, as `model.apertus.xielu` has it."""

    def forward(x: mx.array) -> mx.array:
        def apply(y: Float32) -> Float32:
            bent, above = _bent(y, eps)
            above *= above
            above *= np.float32(alpha_p)
            bent *= np.float32(alpha_n)
            above += bent
            above += np.float32(beta) * y
            return above

        return _in_pieces(apply, x)

    def backward(x: mx.array, cotangent: mx.array, _: mx.array) -> mx.array:
        def apply(y: Float32, slope: Float32) -> Float32:
            return np.asarray(slope * _slopes(y, alpha_p, alpha_n, beta))

        return _in_pieces(apply, x, cotangent)

    return _with_gradient(forward, backward)


def learning_xielu(beta: float, eps: float) -> _Operation:
    """The activation of `x`, `alpha_p` and `alpha_n`, the latter `[1]`; gradients go to all."""

    def forward(x: mx.array, alpha_p: mx.array, alpha_n: mx.array) -> mx.array:
        found: mx.array = xielu(_number(alpha_p), _number(alpha_n), beta, eps)(x)
        return found

    def backward(
        inputs: Sequence[mx.array], cotangent: mx.array, _: mx.array
    ) -> tuple[mx.array, ...]:
        x, alpha_p, alpha_n = inputs
        p, n, y, slope = _number(alpha_p), _number(alpha_n), _view(x), _view(cotangent)
        bent, above = _bent(y, eps)
        at_p, at_n = (np.vdot(slope, array) for array in (above * above, bent))
        at_x = slope * _slopes(y, p, n, beta)
        slopes = (mx.array(np.array([each], np.float32)) for each in (at_p, at_n))
        return mx.array(at_x), *slopes

    return _with_gradient(forward, backward)


def _bent(y: Float32, eps: float) -> tuple[Float32, Float32]:
    """`expm1(min(y, eps)) - y` where `y` is not positive, and `y` where it is; else 0.

    NumPy's expm1 takes seven times as long as its exp. So down to `NEAR` it is a series, without
    what both terms have in common, and from there on exp: `expm1(n + f) = expm1(n) + e^n expm1(f)`.
    """
    zero = np.zeros_like(y)
    below = np.minimum(y, zero)
    least = np.minimum(below, np.full_like(y, eps))
    near = np.maximum(least, np.full_like(y, NEAR))
    far = least - near
    bent = near * np.float32(SERIES[0])
    for factor in SERIES[1:]:
        bent += np.float32(factor)
        bent *= near
    bent *= near
    # Nothing but for values between `eps` and zero.
    least -= below
    bent += least
    bent -= far
    np.exp(far, out=far)
    far -= np.float32(1)
    far *= np.float32(math.exp(NEAR))
    bent += far
    bent *= y <= zero
    return bent, np.maximum(y, zero, out=zero)


def _slopes(y: Float32, alpha_p: float, alpha_n: float, beta: float) -> Float32:
    """The derivative at `y`."""
    zero = np.zeros_like(y)
    slopes: Float32 = np.exp(np.minimum(y, zero))
    slopes -= np.float32(1)
    slopes *= np.float32(alpha_n)
    slopes += np.float32(beta)
    slopes += np.float32(2 * alpha_p) * np.maximum(y, zero)
    return slopes


def _with_gradient(forward: _Operation, backward: Callable[..., Any]) -> _Operation:
    # What `custom_function` returns is typed as a mere object.
    function: Any = mx.custom_function(forward)
    function.vjp(backward)
    operation: _Operation = function
    return operation


def _number(array: mx.array) -> float:
    return float(np.array(array).item())


def _view(array: mx.array) -> Float32:
    return np.array(array, copy=False)


_Piece = tuple[tuple[int, slice, slice], tuple[int, int, slice]]


def _pieces(queries: Float32, keys: Float32) -> Iterator[_Piece]:
    """Queries of the heads that share keys, some at a time, and the keys that they see."""
    batch, heads, length, _ = queries.shape
    shared = heads // keys.shape[1]
    for row in range(batch):
        for head in range(keys.shape[1]):
            for part in blocks(length, BLOCK_QUERIES):
                group = slice(head * shared, (head + 1) * shared)
                yield (row, group, part), (row, head, slice(0, part.stop))


def _weights(queries: Float32, keys: Float32, scale: float) -> Float32:
    """What queries `[heads, n, D]`, the last n, give keys `[L, D]`; `[heads * n, L]`."""
    count, length = queries.shape[1], len(keys)
    scores = queries.reshape(-1, queries.shape[-1]) @ keys.T
    scores *= np.float32(scale)
    recent = scores.reshape(-1, count, length)[:, :, length - count :]
    recent += _future(count)
    scores -= scores.max(-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(-1, keepdims=True)
    return scores


def _future(count: int) -> Float32:
    return np.triu(np.full((count, count), -np.inf, np.float32), 1)


def _in_pieces(apply: Callable[..., npt.NDArray[Any]], *inputs: mx.array) -> mx.array:
    arrays = [_view(array).reshape(-1) for array in inputs]
    result = np.empty_like(arrays[0])
    for part in blocks(len(result), BLOCK_NUMBERS):
        result[part] = apply(*(array[part] for array in arrays))
    return mx.array(result).reshape(inputs[0].shape)
