"""What each rank holds of a model that ranks compute side by side (tensor parallelism).

Each rank has whole attention heads, a share of the feed-forward's inner numbers, and the rows of
some token ids in embedding and head. Norms and xIELU's slopes are on every rank. `split_model.py`
computes with it.

The same scheme: "Megatron-LM" (arXiv 1909.08053).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from apertus_mlx.checkpoint import layout
from apertus_mlx.checkpoint.config import ModelConfig
from apertus_mlx.checkpoint.header import TensorInfo
from apertus_mlx.checkpoint.inventory import Inventory, Part, StoredMatrix
from apertus_mlx.errors import UsageError

ROWS, COLUMNS = 0, 1
AXES = {
    "embed_tokens": ROWS,
    "lm_head": ROWS,
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


def own_ids(count: int, ranks: int) -> int:
    """Of how many of `count` token ids a rank has the rows: all where they do not divide."""
    return count if count % ranks else count // ranks


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
    in_layer = layout.layer_of(matrix.path) is not None
    if axis is None or (not in_layer and own_ids(matrix.rows, ranks) == matrix.rows):
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
