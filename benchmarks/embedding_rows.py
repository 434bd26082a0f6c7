"""How long it takes to read a token's row of the embedding from the file, beside memory.

    python -m benchmarks.embedding_rows [--tokens 2000]

For the geometries of 1.5B and 8B, in 16 bits, in affine codes of 4 and 3 bits and in mxfp4, with
random rows in a file of their real size. Printed is the median time of a token, and in parentheses
that of the quickest turn, which other work disturbs least: the row's bytes alone; the row as MLX's
array ready to compute with; a row that is kept; the same by MLX's operations on the stored parts;
the same from memory; and the row as the CPU path has it. They take turns. The file has just been
written, so that the system has it in memory; a disk adds its own time.

How many tokens of a text find their row kept is counted before, with the released vocabulary where
mistral-common is installed: of the pages in docs/ one after the other, and of each calibration text
by itself.

Then what a fresh process holds, of its own and of MLX's, with the embedding in memory and on disk.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from tokenizers import Tokenizer

from apertus_mlx.backend.cpu.tensors import Tensors
from apertus_mlx.checkpoint import layout
from apertus_mlx.checkpoint.config import parse_config
from apertus_mlx.checkpoint.header import TensorInfo, read_header
from apertus_mlx.checkpoint.inventory import Inventory, StoredMatrix
from apertus_mlx.checkpoint.rows import StoredRows
from apertus_mlx.checkpoint.tensors import Checkpoint
from apertus_mlx.convert.evaluation.texts import DEFAULT_DIRECTORY
from apertus_mlx.model.disk_embedding import PARTS, DiskEmbedding
from apertus_mlx.model.embedding import ProductEmbedding
from apertus_mlx.model.kept_rows import SHARE, KeptRows, kept_bytes
from apertus_mlx.quant.spec import QuantSpec
from benchmarks.make_checkpoint import VOCAB_SIZE, config
from tests.real_tokenizers import tekken_path, write_real_tokenizers

FILE = "model.safetensors"
DTYPE = mx.bfloat16
# Tokens before it is another form's turn.
TURN = 50
DOCS = Path(__file__).parents[1] / "docs"
SPECS = (None, QuantSpec(4, 64), QuantSpec(3, 64), QuantSpec(4, 32, "mxfp4"))


def main() -> None:
    """Measure each form and print a line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--sizes", nargs="+", default=["1.5B", "8B"])
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        hold_one(Path(given.one[0]), *json.loads(given.one[1]))
        return
    shares = print_shares()
    ids = np.random.default_rng(0).integers(0, VOCAB_SIZE, given.tokens).tolist()
    for size in given.sizes:
        for spec in SPECS:
            with tempfile.TemporaryDirectory() as folder:
                inventory = write_embedding(Path(folder), size, spec)
                stored = inventory.matrices[layout.EMBEDDING]
                rows = StoredRows(inventory.checkpoint, stored.tensors)
                embedding, kept, by_mlx = (DiskEmbedding(inventory, DTYPE, True) for _ in range(3))
                assert embedding._row is not None
                embedding._kept, kept._kept = KeptRows(0), KeptRows(SHARE * VOCAB_SIZE)
                for token in ids:
                    kept(mx.array([[token]]))
                by_mlx._row = None
                there = in_memory(Path(folder), stored)
                on_cpu = Tensors(inventory, "float32").embedding()
                times = per_token(
                    ids,
                    {
                        "read": lambda token, rows=rows: rows.read([token]),
                        "ready": lambda token, to=embedding: mx.eval(to(mx.array([[token]]))),
                        "kept": lambda token, to=kept: mx.eval(to(mx.array([[token]]))),
                        "by MLX": lambda token, to=by_mlx: mx.eval(to(mx.array([[token]]))),
                        "memory": lambda token, to=there: mx.eval(to(mx.array([[token]]))),
                        "CPU path": lambda token, to=on_cpu: to(np.array([token])),
                    },
                )
                held = [hold(Path(folder), size, spec, disk) for disk in (False, True)]
            found = ", ".join(f"{name} {a:.1f} us ({b:.1f} us)" for name, (a, b) in times.items())
            for name, share in shares.items():
                pairs = zip(times["kept"], times["ready"], strict=True)
                a, b = (share * kept_one + (1 - share) * read for kept_one, read in pairs)
                found += f", mean of {name} {a:.1f} us ({b:.1f} us)"
            saved = [(a - b) / 1e6 for a, b in zip(*held, strict=True)]
            planned = sum(tensor.size_bytes for tensor in stored.tensors)
            planned -= kept_bytes(stored.rows, stored.columns, DTYPE.size)
            print(
                f"{size} {spec or 'bfloat16'}: {rows.row_bytes} bytes a row; {found}; a process "
                f"holds {saved[0]:.1f} MB less, MLX {saved[1]:.1f} MB less, planned "
                f"{planned / 1e6:.1f} MB less",
                flush=True,
            )


def print_shares() -> dict[str, float]:
    """How many tokens of texts find their row kept; their shares by a name for the texts."""
    if tekken_path() is None:
        print("mistral-common is not installed: no text is counted", flush=True)
        return {}
    with tempfile.TemporaryDirectory() as folder:
        write_real_tokenizers({"v1": Path(folder)})
        tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    pages = "\n".join(path.read_text("utf-8") for path in sorted(DOCS.glob("*.md")))
    tokens, share = share_kept(tokenizer.encode(pages, add_special_tokens=False).ids)
    texts = [path.read_text("utf-8") for path in sorted(DEFAULT_DIRECTORY.iterdir())]
    each = [share_kept(tokenizer.encode(text, add_special_tokens=False).ids) for text in texts]
    lengths, shares = zip(*each, strict=True)
    print(
        f"kept: {share:.1%} of the {tokens:,} tokens of docs/; of {len(texts)} calibration texts "
        f"of {min(lengths)} to {max(lengths)} tokens {min(shares):.1%} to {max(shares):.1%}, "
        f"median {statistics.median(shares):.1%}",
        flush=True,
    )
    return {"docs": share, "a short text": statistics.median(shares)}


def share_kept(ids: Sequence[int]) -> tuple[int, float]:
    """How many tokens there are, and the share of them whose row is kept."""
    rows, row, found = KeptRows(VOCAB_SIZE), mx.zeros(1), 0
    for token in ids:
        if rows.get(token) is None:
            rows.put(token, row)
        else:
            found += 1
    return len(ids), found / len(ids)


def write_embedding(folder: Path, size: str, spec: QuantSpec | None) -> Inventory:
    """A file with the embedding alone."""
    parsed = parse_config(config(size))
    rows, columns = parsed.vocab_size, parsed.hidden_size
    names = PARTS[: 1 if spec is None else 2 + spec.has_biases]
    if (folder / FILE).exists():
        return _inventory(folder, size, spec, names)
    values = mx.random.normal((4096, columns)).astype(mx.bfloat16)
    if spec is None:
        parts: Sequence[mx.array] = (values,)
    else:
        parts = mx.quantize(values, spec.group_size, spec.bits, spec.mode)
    arrays = {
        f"{layout.EMBEDDING}.{name}": mx.concatenate([part] * (rows // 4096))
        for name, part in zip(names, parts, strict=True)
    }
    mx.save_safetensors(str(folder / FILE), arrays)
    return _inventory(folder, size, spec, names)


def _inventory(folder: Path, size: str, spec: QuantSpec | None, names: Sequence[str]) -> Inventory:
    parsed = parse_config(config(size))
    tensors: dict[str, TensorInfo] = {info.name: info for info in read_header(folder / FILE)}
    found = tuple(tensors[f"{layout.EMBEDDING}.{name}"] for name in names)
    matrix = StoredMatrix(layout.EMBEDDING, parsed.vocab_size, parsed.hidden_size, spec, found)
    checkpoint = Checkpoint(size, (FILE,), tensors, folder)
    return Inventory(parsed, checkpoint, {layout.EMBEDDING: matrix}, {}, {})


def in_memory(folder: Path, stored: StoredMatrix) -> nn.Module:
    """The embedding that the file holds, as the loader makes it."""
    arrays = mx.load(str(folder / FILE))
    assert isinstance(arrays, dict)
    parts = {name.rpartition(".")[2]: array for name, array in arrays.items()}
    embedding: nn.Module
    if stored.spec is None:
        embedding = nn.Embedding(1, stored.columns)
    else:
        spec = stored.spec
        embedding = nn.QuantizedEmbedding(1, stored.columns, spec.group_size, spec.bits, spec.mode)
    embedding.update(parts)  # type: ignore[no-untyped-call]
    mx.eval(list(parts.values()))
    return ProductEmbedding(embedding) if ProductEmbedding.is_exact(embedding) else embedding


def per_token(
    ids: Sequence[int], forms: dict[str, Callable[[int], object]]
) -> dict[str, tuple[float, float]]:
    """Median microseconds of each form, and those of its quickest turn."""
    turns: dict[str, list[list[float]]] = {name: [] for name in forms}
    for first in range(0, len(ids), TURN):
        for name, read in forms.items():
            turn = []
            for token in ids[first : first + TURN]:
                began = time.perf_counter()
                read(token)
                turn.append((time.perf_counter() - began) * 1e6)
            turns[name].append(turn)
    return {
        name: (statistics.median(chain(*found)), min(map(statistics.median, found)))
        for name, found in turns.items()
    }


def hold(folder: Path, size: str, spec: QuantSpec | None, disk: bool) -> tuple[int, int]:
    """Bytes that a fresh process holds, of its own and MLX's, after some tokens."""
    form = json.dumps([size, spec and [spec.bits, spec.group_size, spec.mode], disk])
    command = [sys.executable, "-m", "benchmarks.embedding_rows", "--one", str(folder), form]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    own, of_mlx = json.loads(done.stdout.splitlines()[-1])
    return own, of_mlx


def hold_one(folder: Path, size: str, spec: list[Any] | None, disk: bool) -> None:
    """Look up some tokens and print what the process holds."""
    import psutil

    inventory = write_embedding(folder, size, None if spec is None else QuantSpec(*spec))
    if disk:
        embedding: nn.Module = DiskEmbedding(inventory, DTYPE, True)
    else:
        embedding = in_memory(folder, inventory.matrices[layout.EMBEDDING])
    # More than are kept.
    for token in range(0, VOCAB_SIZE, VOCAB_SIZE // 600):
        mx.eval(embedding(mx.array([[token]])))
    print(json.dumps([psutil.Process().memory_full_info().uss, mx.get_active_memory()]))


if __name__ == "__main__":
    main()
