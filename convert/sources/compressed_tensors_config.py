"""The `quantization_config` of compressed-tensors: its format, and how weights are stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from apertus_mlx.checkpoint.config_keys import KeyReader
from apertus_mlx.errors import RejectedError

INTEGER_FORMATS = ("pack-quantized", "int-quantized", "naive-quantized")
FORMATS = (
    *INTEGER_FORMATS, "float-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized",
    "mxfp8-quantized", "mixed-precision",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Group:
    """How one of the config's groups stores weights."""

    bits: int
    kind: str
    strategy: str
    group_size: int | None
    symmetric: bool
    # Rows and columns of a block, where the strategy is `block`.
    block: tuple[int, int] | None = None
    # Whether the columns of a group may lie apart.
    reordered: bool = False


def parse_groups(block: Mapping[str, Any], name: str) -> list[Group]:
    """The groups of the config.

    Raises:
        RejectedError: a format or scheme that is not read, by name.
    """
    where = f"{name}: quantization_config"
    form = block.get("format")
    if form not in FORMATS:
        raise RejectedError(
            f"{where}: format {str(form)[:60]!r} is not read; these are: {', '.join(FORMATS)}; "
            "convert the checkpoint that it was made from"
        )
    if block.get("sparsity_config") not in (None, {}):
        raise RejectedError(f"{where}: sparsity_config: sparse weights are not read")
    if block.get("kv_cache_scheme") is not None:
        raise RejectedError(f"{where}: kv_cache_scheme: a quantized cache is not read")
    if block.get("transform_config") not in (None, {}):
        raise RejectedError(f"{where}: transform_config: transformed weights are not read")
    entries = block.get("config_groups")
    if not isinstance(entries, dict) or not entries:
        raise RejectedError(f"{where}: config_groups: expected an object of groups")
    groups = []
    for key, entry in entries.items():
        place = f"{where}: {str(key)[:60]}"
        weights = entry.get("weights") if isinstance(entry, dict) else None
        if not isinstance(weights, dict):
            raise RejectedError(f"{place}: weights: expected an object")
        keys = KeyReader(weights, place)
        bits = keys.integer("num_bits", 1, 16)
        size = keys.optional_integer("group_size", -1, 2**31)
        strategy = str(weights.get("strategy") or ("group" if size else "tensor"))
        symmetric = keys.optional_boolean("symmetric") is not False
        kind = str(weights.get("type", "int"))
        structure = weights.get("block_structure")
        blocks = _block(structure, place) if strategy == "block" else None
        reordered = str(weights.get("actorder")).lower() in ("group", "dynamic")
        groups.append(Group(bits, kind, strategy, size, symmetric, blocks, reordered))
    return groups


def _block(value: object, place: str) -> tuple[int, int]:
    sizes = value.split("x") if isinstance(value, str) else value
    if not isinstance(sizes, list) or len(sizes) != 2 or not all(str(n).isdecimal() for n in sizes):
        raise RejectedError(f"{place}: block_structure: {str(value)[:40]}: expected two sizes")
    height, width = (int(str(size)[:9]) for size in sizes)
    if not height or not width:
        raise RejectedError(f"{place}: block_structure: {str(value)[:40]}: expected two sizes")
    return height, width


def float_blocks(groups: list[Group], columns: int) -> list[tuple[int, int]]:
    """Blocks of rows and columns that share a scale, but for whole rows and matrices."""
    found = [group.block for group in groups if group.block is not None]
    sizes = {group.group_size for group in groups if group.strategy == "group"}
    return found + [(1, size) for size in sizes if size and 0 < size < columns]
