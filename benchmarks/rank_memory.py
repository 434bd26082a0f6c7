"""What a rank of several holds of a real-size model, beside what was planned from headers.

    python -m benchmarks.rank_memory 8B --ranks 2 [--pipeline]

Writes a checkpoint with random 4-bit codes to a temporary folder, then loads each rank's part in a
process of its own, one after the other, and nothing is computed. Prints as JSON, for each rank, the
planned bytes of weights, those that MLX holds, and the most that the process had in memory. With
`--pipeline` the second half of the ranks has half of the first's memory.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import mlx.core as mx
import numpy as np
from safetensors.numpy import save_file

from apertus_mlx.backend.hardware import peak_bytes
from apertus_mlx.backend.mlx import load_inventory
from apertus_mlx.backend.ranks import Ranks
from apertus_mlx.checkpoint import layout
from apertus_mlx.checkpoint.config import parse_config
from apertus_mlx.checkpoint.inventory import Inventory, take_inventory
from apertus_mlx.memory.footprint import GPU_16_BIT, weights_bytes
from apertus_mlx.memory.layers_by_memory import layers_by_memory
from apertus_mlx.model.split import part_of
from apertus_mlx.model.stages import stage_of
from benchmarks.make_checkpoint import GEOMETRIES, config
from tests.links import Wire

FORMAT = {"group_size": 64, "bits": 4}
MEMORY_BYTES = 64 * 10**9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("size", choices=GEOMETRIES)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--pipeline", action="store_true")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rank is not None:
        part = own_part(take_inventory(given.folder), given.rank, given.ranks, given.pipeline)
        print(json.dumps(measure(part)))
        return
    with tempfile.TemporaryDirectory() as name:
        write(Path(name), given.size)
        for rank in range(given.ranks):
            command = [sys.executable, "-m", "benchmarks.rank_memory", *sys.argv[1:]]
            command += ["--folder", name, "--rank", str(rank)]
            subprocess.run(command, check=True)


def own_part(whole: Inventory, rank: int, ranks: int, pipeline: bool) -> Inventory:
    if not pipeline:
        return part_of(whole, ranks, rank)
    limits = [MEMORY_BYTES // (1 + (2 * each >= ranks)) for each in range(ranks)]
    split = layers_by_memory(whole, limits, GPU_16_BIT)
    return stage_of(whole, split[rank], rank, ranks)


def measure(part: Inventory) -> dict[str, object]:
    before = peak_bytes(gpu=False)
    assert part.part is not None
    links = cast(Ranks, _Links(part.part.rank, part.part.ranks))
    model = load_inventory(part, "bfloat16", ranks=links)
    held = mx.get_active_memory()
    del model
    return {
        "part": str(part.part),
        "planned_bytes": weights_bytes(part, 2),
        "held_bytes": held,
        "process_peak_bytes": peak_bytes(gpu=False) - before,
    }


class _Links(Wire):
    def sum(self, x: mx.array) -> mx.array:
        return x

    gather = sum


def write(folder: Path, size: str) -> None:
    """A shard for each layer, and one for what stands in none."""
    values = {**config(size), "quantization": FORMAT}
    (folder / "config.json").write_text(json.dumps(values))
    parsed = parse_config(values)
    draw = np.random.default_rng(0)
    places: dict[str, str] = {}
    shards: dict[int | None, list[layout.Matrix]] = {}
    for matrix in layout.matrices(parsed):
        shards.setdefault(layout.layer_of(matrix.path), []).append(matrix)
    for number, (layer, matrices) in enumerate(shards.items(), 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        arrays = dict(codes(matrices, draw))
        for key, shape in layout.vectors(parsed):
            if layout.layer_of(key) == layer:
                arrays[key] = np.ones(shape, np.float16)
        save_file(arrays, folder / name)
        places |= dict.fromkeys(arrays, name)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def codes(
    matrices: list[layout.Matrix], draw: np.random.Generator
) -> Iterator[tuple[str, np.ndarray]]:
    for matrix in matrices:
        packed = matrix.rows, matrix.columns * FORMAT["bits"] // 32
        yield matrix.weight, draw.integers(0, 2**32, packed, np.uint32)
        for kind in ("scales", "biases"):
            groups = matrix.rows, matrix.columns // FORMAT["group_size"]
            yield f"{matrix.path}.{kind}", np.full(groups, 0.01, np.float16)


if __name__ == "__main__":
    main()
