"""Bytes that the process holds on the CPU path beside cache and prompt: an upper bound.

These are libraries, tokenizer and weights. `apertus_mlx.backend.cpu.weights` stores affine matrices
as codes of 2, 4 or 8 bits or in planes of 4. Each group has four bytes for the scale of each plane,
for an offset and, where activations are int8, for the sum of its codes. Other matrices are float32;
rows of an untied embedding stay in the file. While a matrix is read, two more copies of its codes
exist. Loading goes by stages, first the head, then each layer; the copies of a stage are freed
together.

Measured on Linux (glibc, onnxruntime 1.32, two cores) with `benchmarks/cpu_memory.py`, which shows
the command. Not measured on macOS.
"""

from __future__ import annotations

from apertus_mlx.backend.cpu.weights import activations_for, parts_of
from apertus_mlx.checkpoint import layout
from apertus_mlx.checkpoint.inventory import Inventory, StoredMatrix
from apertus_mlx.hub.apertus_models import RELEASED_TOKENIZER_BYTES

# Python, MLX, onnxruntime and the command line; the graphs of a layer.
LIBRARIES_BYTES, LAYER_BYTES = 114_000_000, 250_000
# The tokenizer takes bytes per vocabulary entry and per byte of its file. Measured: 99 MB for
# 131,072 entries in 3.9 MB, 190 MB for as many and 269,443 merges in 17.1 MB.
ENTRY_BYTES, FILE_COPIES = 560, 7
# Bytes a weight while a matrix is read that becomes float32: from floats, from a float mode.
FLOATS_LOADING_BYTES, MODE_LOADING_BYTES = 8, 16


def fixed_bytes(inventory: Inventory) -> int:
    """Bytes of libraries, graphs and tokenizer."""
    config, file_bytes = inventory.config, inventory.tokenizer_bytes
    if file_bytes is None:
        file_bytes = RELEASED_TOKENIZER_BYTES
    tokenizer = ENTRY_BYTES * config.vocab_size + FILE_COPIES * file_bytes
    return LIBRARIES_BYTES + LAYER_BYTES * config.num_hidden_layers + tokenizer


def weights_bytes(inventory: Inventory, precision: str) -> tuple[int, int]:
    """Bytes of all weights as onnxruntime keeps them, and at the worst moment of loading.

    The latter is what loading takes above all weights; it may be negative.
    """
    held, worst = 0, 0
    for own, passing in _stages(inventory, precision).values():
        held += own
        worst = max(worst, held + passing)
    return held, worst - held


def _stages(inventory: Inventory, precision: str) -> dict[str, tuple[int, int]]:
    """For the head and each layer: the bytes that stay, and those that loading adds for a time."""
    stages = {layout.HEAD: (0, 0)}
    for path, matrix in inventory.matrices.items():
        stage = layout.HEAD
        if path not in (layout.EMBEDDING, layout.HEAD):
            stage = path.rsplit(".", 2)[0]
        elif path == layout.EMBEDDING and not inventory.config.tie_word_embeddings:
            continue
        found = _matrix_bytes(matrix, precision)
        before = stages.get(stage, (0, 0))
        stages[stage] = (before[0] + found[0], before[1] + found[1])
    return stages


def _matrix_bytes(matrix: StoredMatrix, precision: str) -> tuple[int, int]:
    weights, spec = matrix.rows * matrix.columns, matrix.spec
    if spec is None or not spec.has_biases:
        return 4 * weights, (FLOATS_LOADING_BYTES if spec is None else MODE_LOADING_BYTES) * weights
    activations = activations_for(spec.bits, precision)
    planes = parts_of(spec.bits, activations)
    codes = weights * sum(plane.stored_bits for plane in planes) // 8
    numbers = len(planes) + (2 if activations == "int8" else 1)
    return codes + 4 * numbers * (weights // spec.group_size), 2 * codes
