"""Gives each output tensor its place: shards of bounded size, their headers, offsets."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from apertus_mlx.convert.plan.plan import DTYPE_BYTES, OutputFile, OutputTensor, Step

MAX_SHARD_BYTES = 1_900_000_000


def place(
    steps: list[Step], max_shard_bytes: int
) -> tuple[tuple[Step, ...], tuple[OutputFile, ...]]:
    """Give every output tensor its file and offset; a module's tensors stay in one shard."""
    shards: list[list[Step]] = [[]]
    used = 0
    for step in steps:
        if used and used + step.size_bytes > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(step)
        used += step.size_bytes
    placed: dict[str, OutputTensor] = {}
    files = []
    for number, shard in enumerate(shards, 1):
        name = "model.safetensors"
        if len(shards) > 1:
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        offset = 0
        # Widest types first, so that every tensor lies on a multiple of its element's size.
        tensors = [tensor for step in shard for tensor in step.outputs]
        tensors.sort(key=lambda tensor: -DTYPE_BYTES[tensor.dtype])
        for tensor in tensors:
            placed[tensor.name] = replace(tensor, file=name, offset=offset)
            offset += tensor.size_bytes
        files.append(OutputFile(name, _header(placed[t.name] for t in tensors), offset))
    done = tuple(
        replace(step, outputs=tuple(placed[tensor.name] for tensor in step.outputs))
        for shard in shards
        for step in shard
    )
    return done, tuple(files)


def _header(tensors: Iterator[OutputTensor]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    for tensor in tensors:
        end = tensor.offset + tensor.size_bytes
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [tensor.offset, end],
        }
    raw = json.dumps(entries, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw
