"""Bytes of a model's weights where MLX computes; `cpu` has those of the CPU path."""

from __future__ import annotations

import math

from apertus_mlx.checkpoint import layout
from apertus_mlx.checkpoint.inventory import Inventory


def weights_bytes(inventory: Inventory, compute_bytes: int) -> int:
    """Bytes of all weights in memory, where floats take `compute_bytes` each."""
    matrices = sum(m.weight_bytes(compute_bytes) for m in inventory.matrices.values())
    numbers = sum(math.prod(shape) for _, shape in layout.vectors(inventory.config))
    return matrices + numbers * compute_bytes


def read_per_token_bytes(inventory: Inventory, compute_bytes: int) -> int:
    """Bytes of weights that one decoding step reads: all but an untied embedding."""
    read = weights_bytes(inventory, compute_bytes)
    if not inventory.config.tie_word_embeddings:
        read -= inventory.matrices[layout.EMBEDDING].weight_bytes(compute_bytes)
    return read
