"""One step of an optimizer in parts, so that only the gradient of one part is held at a time.

For optimizers that look at each parameter alone, as Adam does; their state is what one step for the
whole model would leave. With plain gradient descent it is that of "Full Parameter Fine-tuning for
Large Language Models with Limited Resources" (arXiv 2306.09782).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
from mlx.utils import tree_flatten, tree_unflatten

from apertus_mlx.convert.distill.student import CODES, Quantized
from apertus_mlx.quant.arrays import blocks

# Numbers of a large table that are updated at once.
BLOCK_NUMBERS = 1 << 22


class PartialUpdates:
    """Steps of `optimizer` for `model`; `begin` each, then update every part once."""

    def __init__(self, optimizer: optimizers.MultiOptimizer, model: nn.Module) -> None:
        self._optimizer = optimizer
        self._model = model

    def begin(self) -> None:
        """Count the step and set its rates, which hold for all parts."""
        self._optimizer.init(nn.Module.trainable_parameters(self._model))
        self._optimizer.apply_gradients({}, self._model)

    def update(self, path: str, module: nn.Module, gradients: Mapping[str, mx.array]) -> None:
        """Update the parameters of `module`, which stands at `path`, that `gradients` names."""
        values = dict(tree_flatten(module.trainable_parameters()))
        found, states = [], []
        for name, gradient in gradients.items():
            optimizer, state = self._place(f"{path}.{name}")
            found.append((name, optimizer.apply_single(gradient, values[name], state)))
            states.append(state)
        module.update(tree_unflatten(found))
        for part in module.modules():
            if isinstance(part, Quantized):
                part.keep_in_range()
        mx.eval(module.trainable_parameters(), states)

    def update_rows(
        self, path: str, table: Quantized, gradient: Callable[[slice], mx.array]
    ) -> None:
        """Update `table`, some rows at a time.

        `gradient` gives that of the weights `[rows, columns]` of some rows.
        """
        for rows in row_blocks(table.scales.shape[0], table.codes.shape[1]):
            slopes = table_gradients(table, rows, gradient(rows))
            for name, slope in slopes.items():
                optimizer, state = self._place(f"{path}.{name}")
                moments = {key: array[rows] for key, array in state.items()}
                value = optimizer.apply_single(slope, table[name][rows], moments)
                if name == CODES:
                    value = table.in_range(value)
                mx.eval(value, moments)
                # In place: nothing else holds what these arrays were.
                table[name][rows] = value
                for key, moment in moments.items():
                    state[key][rows] = moment
                mx.eval(table[name], state)

    def _place(self, path: str) -> tuple[optimizers.Optimizer, dict[str, mx.array]]:
        """The optimizer of a parameter, and what it keeps of it."""
        chosen = zip(self._optimizer.optimizers, self._optimizer.filters, strict=True)
        optimizer = next(each for each, takes in chosen if takes(path, None))
        tree: Any = optimizer.state
        for key in path.split("."):
            tree = tree[int(key) if isinstance(tree, list) else key]
        return optimizer, tree


def row_blocks(rows: int, columns: int) -> list[slice]:
    """Rows of a table, as many at once as `BLOCK_NUMBERS` allows."""
    return list(blocks(rows, max(1, BLOCK_NUMBERS // columns)))


def table_gradients(table: Quantized, rows: slice, slopes: mx.array) -> dict[str, mx.array]:
    """Of what learns in some rows, from the gradient of their weights; by name."""
    parts = {name: table[name][rows] for name in (CODES, "scales", "biases")}
    learning = [name for name in parts if name in nn.Module.trainable_parameters(table)]

    def weights(*values: mx.array) -> list[mx.array]:
        return [table.weights_of(**{**parts, **dict(zip(learning, values, strict=True))})]

    _, found = mx.vjp(weights, [parts[name] for name in learning], [slopes])
    # What is still to compute would hold the whole table, which could not be changed in place.
    mx.eval(found)
    return dict(zip(learning, found, strict=True))
