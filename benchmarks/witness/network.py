"""The model to train: `model.apertus` where MLX has a GPU, else with NumPy where MLX is slow.

`python -m benchmarks.witness.engines` compares the latter with PyTorch, whose steps take 0.67 to
0.9 of its time; but only the extra `parity` brings that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from apertus_mlx.backend.hardware import has_gpu
from apertus_mlx.checkpoint.config import parse_config
from apertus_mlx.convert.evaluation.numpy_operations import causal_attention
from apertus_mlx.convert.evaluation.products import product
from apertus_mlx.model.apertus import XIELU, Attention, Model
from apertus_mlx.quant.arrays import Float32, blocks
from benchmarks.witness.geometry import Size

# Tokens whose logits stand in memory at once, and numbers that the activation is applied to.
_BLOCK_TOKENS, _BLOCK_NUMBERS = 256, 1 << 15
# Without `learns` no gradient can be taken.
Loss = Callable[..., mx.array]


def new_model(size: Size, seed: int) -> tuple[Model, Loss]:
    """Random float32 weights, and the mean loss of the tokens after the first of each window."""
    mx.random.seed(seed)
    model = Model(parse_config(size.config))
    for _, module in model.named_modules():
        if isinstance(module, XIELU):
            # Constants of the architecture.
            module.freeze(keys=["beta", "eps"])
    if has_gpu():
        return model, _loss
    modules: list[tuple[str, Any]] = list(model.named_modules())
    for _, module in modules:
        for name, child in list(module.items()):
            if isinstance(child, nn.Linear):
                setattr(module, name, _Projection(child.weight))
            elif isinstance(child, XIELU):
                setattr(module, name, _XIELU())
        if isinstance(module, Attention):
            _attend_by_numpy(module)
    return model, _cpu_loss


def _loss(model: Model, batch: mx.array, learns: bool = True) -> mx.array:
    logits = model(batch[:, :-1])
    return nn.losses.cross_entropy(logits, batch[:, 1:], reduction="mean")


def _cpu_loss(model: Model, batch: mx.array, learns: bool = True) -> mx.array:
    hidden = model.model(batch[:, :-1])
    # Gradients go through the embedding both ways.
    table: mx.array = model.model.embed_tokens.weight
    targets = np.array(batch[:, 1:]).reshape(-1)
    return head_loss(hidden.reshape(-1, hidden.shape[-1]), table, targets, learns)


class _Projection(nn.Module):
    def __init__(self, weight: mx.array) -> None:
        super().__init__()
        self.weight = weight

    def __call__(self, x: mx.array) -> mx.array:
        return product(x, self.weight)


class _XIELU(XIELU):
    """The activation with trainable slopes."""

    def __init__(self) -> None:
        super().__init__()
        self.freeze(keys=["beta", "eps"])

    def __call__(self, x: mx.array) -> mx.array:
        alpha_p, alpha_n, _, _ = self.slopes()
        return xielu(x, alpha_p, alpha_n, float(self.beta.item()), float(self.eps.item()))


def _attend_by_numpy(attention: Attention) -> None:
    mixed = causal_attention(attention.scale)

    def attend(queries: mx.array, keys: mx.array, values: mx.array, mask: Any) -> mx.array:
        output = mixed(queries, keys, values)
        return output.transpose(0, 2, 1, 3).reshape(output.shape[0], output.shape[2], -1)

    attention.attend = attend  # type: ignore[method-assign,assignment]


def xielu(x: mx.array, alpha_p: mx.array, alpha_n: mx.array, beta: float, eps: float) -> mx.array:
    """`model.apertus.xielu` by NumPy, with gradients to `x` and both slopes, each `[1]`."""

    def forward(x: mx.array, alpha_p: mx.array, alpha_n: mx.array) -> mx.array:
        above, below = (np.float32(slope.item()) for slope in (alpha_p, alpha_n))
        source = _flat(x)
        result = np.empty_like(source)
        for part in blocks(len(source), _BLOCK_NUMBERS):
            y = source[part]
            result[part] = above * _square(y) + below * _bent(y, eps) + beta * y
        return mx.array(result).reshape(x.shape)

    def backward(
        primals: tuple[mx.array, ...], cotangent: mx.array, _: mx.array
    ) -> tuple[mx.array, ...]:
        x, alpha_p, alpha_n = primals
        above, below = (np.float32(slope.item()) for slope in (alpha_p, alpha_n))
        source, slopes = _flat(x), _flat(cotangent)
        result = np.empty_like(source)
        sums = [0.0, 0.0]
        for part in blocks(len(source), _BLOCK_NUMBERS):
            y, slope = source[part], slopes[part]
            sums[0] += float(slope @ _square(y))
            sums[1] += float(slope @ _bent(y, eps))
            curve = below * np.expm1(np.minimum(y, np.float32(0)))
            result[part] = slope * (2 * above * np.maximum(y, np.float32(0)) + curve + beta)
        found = [mx.array([total], mx.float32).reshape(s.shape)
                 for total, s in zip(sums, (alpha_p, alpha_n), strict=True)]  # fmt: skip
        return mx.array(result).reshape(x.shape), found[0], found[1]

    function: Any = mx.custom_function(forward)
    function.vjp(backward)
    activated: mx.array = function(x, alpha_p, alpha_n)
    return activated


def head_loss(
    hidden: mx.array, table: mx.array, targets: np.ndarray, learns: bool = True
) -> mx.array:
    """Mean cross entropy of `hidden` `[tokens, D]` with the head `table` `[vocabulary, D]`.

    Logits are made a block at a time, and the gradients with them where it `learns`.
    """
    gradients: list[Float32] = []

    def forward(hidden: mx.array, table: mx.array) -> mx.array:
        states, matrix = (np.array(array, copy=False) for array in (hidden, table))
        pulled, total = [np.empty_like(states), np.zeros_like(matrix)], 0.0
        for part in blocks(len(states), _BLOCK_TOKENS):
            rows = np.arange(part.stop - part.start)
            scores = states[part] @ matrix.T
            scores -= scores.max(-1, keepdims=True)
            total -= float(scores[rows, targets[part]].sum(dtype=np.float64))
            np.exp(scores, out=scores)
            sums = scores.sum(-1, keepdims=True)
            total += float(np.log(sums).sum(dtype=np.float64))
            if not learns:
                continue
            scores /= sums
            scores[rows, targets[part]] -= 1
            scores /= np.float32(len(states))
            pulled[0][part] = scores @ matrix
            pulled[1] += scores.T @ states[part]
        gradients[:] = pulled
        return mx.array(total / len(states), mx.float32)

    def backward(
        primals: tuple[mx.array, ...], cotangent: mx.array, _: mx.array
    ) -> tuple[mx.array, ...]:
        scale = np.float32(cotangent.item())
        return mx.array(gradients[0] * scale), mx.array(gradients[1] * scale)

    function: Any = mx.custom_function(forward)
    function.vjp(backward)
    loss: mx.array = function(hidden, table)
    return loss


def _flat(array: mx.array) -> Float32:
    return np.array(array, copy=False).reshape(-1)


def _square(y: Float32) -> Float32:
    above = np.maximum(y, np.float32(0))
    return above * above


def _bent(y: Float32, eps: float) -> Float32:
    """What the slope of the negative side is multiplied with; nothing above zero."""
    bent: Float32 = (np.expm1(np.minimum(y, np.float32(eps))) - y) * (y <= 0)
    return bent
