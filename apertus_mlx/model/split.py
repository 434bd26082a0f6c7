"""How a model is split over ranks that compute side by side (tensor parallelism).

Each rank has whole attention heads and a share of the feed-forward's inner numbers. What reads the
residual stream is split by rows, what writes to it by columns, and the ranks' shares of what is
written are summed. Embedding, head, norms and xIELU's slopes are on every rank.

The same scheme: "Megatron-LM" (arXiv 1909.08053).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from apertus_mlx.checkpoint.config import ModelConfig
from apertus_mlx.checkpoint.header import TensorInfo
from apertus_mlx.checkpoint.inventory import Inventory, Part, StoredMatrix
from apertus_mlx.errors import UsageError
from apertus_mlx.model.apertus import Model

ROWS, COLUMNS = 0, 1
# Every other matrix is whole on every rank.
AXES = {
    "q_proj": ROWS,
    "k_proj": ROWS,
    "v_proj": ROWS,
    "o_proj": COLUMNS,
    "up_proj": ROWS,
    "down_proj": COLUMNS,
}


def axis_of(path: str) -> int | None:
    """Along which axis the matrix at a module's `path` is split; None: not at all."""
    return AXES.get(path.rpartition(".")[2])


def part_of(inventory: Inventory, ranks: int, rank: int = 0) -> Inventory:
    """What rank `rank` of `ranks` holds of a checkpoint; of every one the shapes are the same.

    Raises:
        UsageError: heads, the feed-forward or the groups of a matrix do not divide.
    """
    if ranks == 1:
        return inventory
    if obstacle := _obstacle(inventory, ranks):
        most = inventory.config.num_key_value_heads
        possible = [str(n) for n in range(2, most + 1) if _obstacle(inventory, n) is None]
        way_out = f"; {' or '.join(possible)} would do" if possible else ""
        raise UsageError(f"{inventory.name}: {ranks} ranks: {obstacle}{way_out}")
    config = inventory.config
    own_config = replace(
        config,
        num_attention_heads=config.num_attention_heads // ranks,
        num_key_value_heads=config.num_key_value_heads // ranks,
        intermediate_size=config.intermediate_size // ranks,
    )
    matrices = {path: _part(matrix, ranks) for path, matrix in inventory.matrices.items()}
    return replace(inventory, config=own_config, matrices=matrices, part=Part(rank, ranks))


def _obstacle(inventory: Inventory, ranks: int) -> str | None:
    """Why a checkpoint cannot be split so, in words."""
    for what, size in _sizes(inventory.config):
        if size % ranks:
            return f"{size} {what} do not divide by {ranks}"
    for path, matrix in inventory.matrices.items():
        if axis_of(path) == COLUMNS and matrix.spec is not None:
            columns = matrix.columns // ranks
            if not matrix.spec.fits(columns):
                return f"{path}: {columns} columns would cut a group ({matrix.spec})"
    return None


def _sizes(config: ModelConfig) -> Iterator[tuple[str, int]]:
    yield "attention heads", config.num_attention_heads
    yield "key/value heads", config.num_key_value_heads
    yield "inner numbers of the feed-forward", config.intermediate_size


def _part(matrix: StoredMatrix, ranks: int) -> StoredMatrix:
    axis = axis_of(matrix.path)
    if axis is None:
        return matrix
    factor = matrix.factor
    if factor is not None and axis == ROWS and factor.shape != (1,):
        factor = _cut(factor, ROWS, ranks)
    return replace(
        matrix,
        rows=matrix.rows // ranks if axis == ROWS else matrix.rows,
        columns=matrix.columns // ranks if axis == COLUMNS else matrix.columns,
        tensors=tuple(_cut(tensor, axis, ranks) for tensor in matrix.tensors),
        factor=factor,
    )


def _cut(tensor: TensorInfo, axis: int, ranks: int) -> TensorInfo:
    """The tensor as it is on one rank; where it lies in the file stays that of the whole."""
    shape = list(tensor.shape)
    shape[axis] //= ranks
    return replace(tensor, shape=tuple(shape), size_bytes=tensor.size_bytes // ranks)


class SummedLinear(nn.Module):
    """A product of which each rank computes a share: the sum over all ranks."""

    def __init__(self, linear: nn.Module, summed: Callable[[mx.array], mx.array]) -> None:
        super().__init__()
        self.linear = linear
        self._summed = summed

    def __call__(self, x: mx.array) -> mx.array:
        """Apply to this rank's `x` `[..., in / ranks]`; returns `[..., out]`, on all the same."""
        return self._summed(self.linear(x))


def sum_shares(model: Model, summed: Callable[[mx.array], mx.array]) -> None:
    """Have `model`, made of one rank's part, add what the others compute.

    `summed`: the sum of an array over all ranks.
    """
    replaced = [
        (path, SummedLinear(module, summed))
        for path, module in model.named_modules()
        if axis_of(path) == COLUMNS
    ]
    model.update_modules(tree_unflatten(replaced))
