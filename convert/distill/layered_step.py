"""A step of training layer by layer: each learns during the backward pass, and its gradient goes.

Layers keep their inputs alone and are run again for their gradients. Logits are computed for some
rows of the head at a time, the loss for some tokens, so that only one array is shaped like the
logits. What is learnt is what one step for the whole model would learn, but for rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from apertus_mlx.checkpoint import layout
from apertus_mlx.convert.distill import objective
from apertus_mlx.convert.distill.partial_updates import PartialUpdates, row_blocks
from apertus_mlx.convert.distill.student import Quantized
from apertus_mlx.convert.distill.teacher_cache import Batch
from apertus_mlx.convert.evaluation.products import product
from apertus_mlx.model.apertus import Model, make_mask


class LayeredStep:
    """Steps of `optimizer`, which looks at each parameter alone, on `student`."""

    def __init__(
        self, student: Model, optimizer: optimizers.MultiOptimizer, text_share: float
    ) -> None:
        self._student = student
        self._text_share = text_share
        self._updates = PartialUpdates(optimizer, student)

    def judge(self, batch: Batch) -> tuple[mx.array, mx.array]:
        """The loss on a batch, and the divergence in it."""
        _, hidden = self._forward(batch.tokens)
        return self._loss(self._logits(hidden), batch)

    def learn(self, batch: Batch) -> mx.array:
        """Learn from a batch; the loss on it before."""
        decoder: Any = self._student.model
        inputs, hidden = self._forward(batch.tokens)
        logits = self._logits(hidden)
        loss, _ = self._loss(logits, batch, becomes_slopes=True)
        self._updates.begin()
        slopes = self._pulled(logits).reshape(inputs[-1].shape)
        slopes = self._pull("model.norm", decoder.norm, slopes, inputs.pop())
        mask = make_mask(batch.tokens.shape[1], None)
        for index in reversed(range(len(inputs))):
            layer = self._student.layers[index]
            slopes = self._pull(layout.layer(index), layer, slopes, inputs.pop(), mask, None)
        self._learn_tables(
            lambda rows: product(logits[:, rows].T, hidden.T),
            lambda rows: _scattered(batch.tokens.flatten(), slopes.flatten(0, 1), rows),
        )
        return loss

    def _forward(self, tokens: mx.array) -> tuple[list[mx.array], mx.array]:
        """Inputs `[B, L, D]` of each layer and the final norm, and hidden states `[B * L, D]`."""
        decoder: Any = self._student.model
        mask = make_mask(tokens.shape[1], None)
        inputs = [decoder.embed_tokens(tokens)]
        for layer in self._student.layers:
            inputs.append(layer(inputs[-1], mask, None))
            mx.eval(inputs[-1])
        hidden = decoder.norm(inputs[-1]).flatten(0, 1)
        mx.eval(hidden)
        return inputs, hidden

    def _logits(self, hidden: mx.array) -> mx.array:
        """Logits `[tokens, vocabulary]` of hidden states `[tokens, D]`."""
        logits = mx.zeros((len(hidden), self._student.config.output_vocab_size))
        for rows, weights in self._head_rows():
            logits[:, rows] = product(hidden, weights)
            mx.eval(logits)
        return logits

    def _pulled(self, slopes: mx.array) -> mx.array:
        """The gradient at the hidden states, from that at the logits."""
        found = mx.zeros((len(slopes), self._student.config.hidden_size))
        for rows, weights in self._head_rows():
            found = found + product(slopes[:, rows], weights.T)
            mx.eval(found)
        return found

    def _head_rows(self) -> Any:
        head: Any = self._student.head
        config = self._student.config
        for rows in row_blocks(config.output_vocab_size, config.hidden_size):
            yield rows, _rows(head, rows)

    def _loss(
        self, logits: mx.array, batch: Batch, becomes_slopes: bool = False
    ) -> tuple[mx.array, mx.array]:
        """The loss and the divergence in it.

        `becomes_slopes`: `logits` is overwritten with the gradient at it.
        """
        following = batch.following
        grow = objective.slopes(following, self._text_share)
        likeliest, shares = batch.likeliest.flatten(0, 1), batch.shares.flatten(0, 1)
        losses: tuple[list[mx.array], ...] = ([], [])
        for rows in row_blocks(*logits.shape):

            def of_tokens(logits: mx.array, rows: slice = rows) -> tuple[mx.array, mx.array]:
                return objective.of_tokens(logits, likeliest[rows], shares[rows], following[rows])

            if becomes_slopes:
                some, slopes = mx.vjp(of_tokens, [logits[rows]], [each[rows] for each in grow])
                mx.eval(some, slopes)
                logits[rows] = slopes.pop()
                mx.eval(logits)
            else:
                some = list(of_tokens(logits[rows]))
                mx.eval(some)
            for known, more in zip(losses, some, strict=True):
                known.append(more)
        divergences, surprises = map(mx.concatenate, losses)
        return objective.mean(divergences, surprises, following, self._text_share)

    def _pull(
        self, path: str, module: nn.Module, slopes: mx.array, x: mx.array, *rest: Any
    ) -> mx.array:
        """The gradient at the input `x` of `module`, from that at its output; it learns as well."""
        parameters: Any = tree_flatten(module.trainable_parameters())
        names = [name for name, _ in parameters]

        def apply(x: mx.array, *values: mx.array) -> list[mx.array]:
            module.update(tree_unflatten(list(zip(names, values, strict=True))))
            return [module(x, *rest)]

        _, found = mx.vjp(apply, [x, *(value for _, value in parameters)], [slopes])
        mx.eval(found)
        module.update(tree_unflatten(parameters))
        self._updates.update(path, module, dict(zip(names, found[1:], strict=True)))
        return found[0]

    def _learn_tables(
        self, by_logits: Callable[[slice], mx.array], by_tokens: Callable[[slice], mx.array]
    ) -> None:
        """Embedding and head learn from the gradients of some rows of their weights."""
        embedding, head = self._student.model.embed_tokens, self._student.head
        if embedding is head:
            tables = [(layout.EMBEDDING, head, lambda rows: by_logits(rows) + by_tokens(rows))]
        else:
            tables = [(layout.HEAD, head, by_logits), (layout.EMBEDDING, embedding, by_tokens)]
        for path, table, gradient in tables:
            if isinstance(table, Quantized):
                self._updates.update_rows(path, table, gradient)


def _rows(table: Any, rows: slice) -> mx.array:
    """Some rows of a matrix in float32."""
    weights: mx.array = table.weights(rows) if isinstance(table, Quantized) else table.weight[rows]
    return weights


def _scattered(tokens: mx.array, slopes: mx.array, rows: slice) -> mx.array:
    """The gradient `[rows, D]` of some rows of an embedding, from that at each token's `[n, D]`."""
    ids = np.array(tokens)
    inside = np.flatnonzero((ids >= rows.start) & (ids < rows.stop))
    found = mx.zeros((rows.stop - rows.start, slopes.shape[1]))
    if not len(inside):
        return found
    return found.at[mx.array(ids[inside] - rows.start)].add(slopes[mx.array(inside)])
