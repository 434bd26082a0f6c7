"""How long it takes to read a token's row of the embedding from the file, beside memory.

    python -m benchmarks.embedding_rows [--tokens 2000]

For the geometries of 1.5B and 8B, in 16 bits and in affine codes of 4 bits, with random rows in a
file of their real size. Printed is the median time of a token: the row's bytes alone, the row as
MLX's array ready to compute with, and the same from memory. The file has just been written, so that
the system has it in memory; a disk adds its own time.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from apertus_mlx.checkpoint import layout
from apertus_mlx.checkpoint.config import parse_config
from apertus_mlx.checkpoint.header import TensorInfo, read_header
from apertus_mlx.checkpoint.inventory import Inventory, StoredMatrix
from apertus_mlx.checkpoint.rows import StoredRows
from apertus_mlx.checkpoint.tensors import Checkpoint
from apertus_mlx.model.disk_embedding import DiskEmbedding
from apertus_mlx.model.embedding import ProductEmbedding
from apertus_mlx.quant.spec import QuantSpec
from benchmarks.make_checkpoint import VOCAB_SIZE, config

FILE = "model.safetensors"


def main() -> None:
    """Measure each form and print a line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--sizes", nargs="+", default=["1.5B", "8B"])
    given = parser.parse_args()
    ids = np.random.default_rng(0).integers(0, VOCAB_SIZE, given.tokens).tolist()
    for size in given.sizes:
        for spec in (None, QuantSpec(4, 64)):
            with tempfile.TemporaryDirectory() as folder:
                inventory = write_embedding(Path(folder), size, spec)
                dtype = mx.float32 if spec is None else mx.bfloat16
                embedding = DiskEmbedding(inventory, dtype, True)
                stored = inventory.matrices[layout.EMBEDDING]
                rows = StoredRows(inventory.checkpoint, stored.tensors)
                there = in_memory(Path(folder), stored, dtype)
                times = (
                    per_token(ids, lambda token, rows=rows: rows.read([token])),
                    per_token(ids, lambda token, to=embedding: mx.eval(to(mx.array([[token]])))),
                    per_token(ids, lambda token, to=there: mx.eval(to(mx.array([[token]])))),
                )
            print(
                f"{size} {spec or 'bfloat16'}: {rows.row_bytes} bytes a row; read "
                f"{times[0]:.1f} us, ready {times[1]:.1f} us, from memory {times[2]:.1f} us"
            )


def write_embedding(folder: Path, size: str, spec: QuantSpec | None) -> Inventory:
    """A file with the embedding alone."""
    parsed = parse_config(config(size))
    rows, columns = parsed.vocab_size, parsed.hidden_size
    values = mx.random.normal((4096, columns)).astype(mx.bfloat16)
    parts = (values,) if spec is None else tuple(mx.quantize(values, spec.group_size, spec.bits))
    names = ("weight", "scales", "biases")[: len(parts)]
    arrays = {
        f"{layout.EMBEDDING}.{name}": mx.concatenate([part] * (rows // 4096))
        for name, part in zip(names, parts, strict=True)
    }
    mx.save_safetensors(str(folder / FILE), arrays)
    tensors: dict[str, TensorInfo] = {info.name: info for info in read_header(folder / FILE)}
    found = tuple(tensors[f"{layout.EMBEDDING}.{name}"] for name in names)
    matrix = StoredMatrix(layout.EMBEDDING, rows, columns, spec, found)
    checkpoint = Checkpoint(size, (FILE,), tensors, folder)
    return Inventory(parsed, checkpoint, {layout.EMBEDDING: matrix}, {}, {})


def in_memory(folder: Path, stored: StoredMatrix, dtype: mx.Dtype) -> nn.Module:
    """The embedding that the file holds, as the loader makes it."""
    arrays = mx.load(str(folder / FILE))
    assert isinstance(arrays, dict)
    parts = {name.rpartition(".")[2]: array for name, array in arrays.items()}
    embedding: nn.Module
    if stored.spec is None:
        embedding = nn.Embedding(1, stored.columns)
        parts = {name: array.astype(dtype) for name, array in parts.items()}
    else:
        spec = stored.spec
        embedding = nn.QuantizedEmbedding(1, stored.columns, spec.group_size, spec.bits)
    embedding.update(parts)  # type: ignore[no-untyped-call]
    mx.eval(list(parts.values()))
    return ProductEmbedding(embedding) if ProductEmbedding.is_exact(embedding) else embedding


def per_token(ids: Iterable[int], read: Callable[[int], object]) -> float:
    """Median microseconds."""
    times = []
    for token in ids:
        began = time.perf_counter()
        read(token)
        times.append(time.perf_counter() - began)
    return statistics.median(times) * 1e6


if __name__ == "__main__":
    main()
