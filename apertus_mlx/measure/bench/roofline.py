"""The roofline of decoding: bytes that a token has to read, and what bandwidth makes of them."""

from __future__ import annotations

from apertus_mlx.cache.config import CacheConfig
from apertus_mlx.checkpoint import layout
from apertus_mlx.checkpoint.config import ModelConfig
from apertus_mlx.checkpoint.inventory import Inventory
from apertus_mlx.memory.footprint import kv_bytes_per_position


def weights_read_bytes(inventory: Inventory) -> int:
    """Bytes of weights, as stored, that one token reads: all, but of the embedding one row.

    A tied embedding is the head as well, and so is read whole, too.
    """
    config = inventory.config
    table = sum(tensor.size_bytes for tensor in inventory.matrices[layout.EMBEDDING].tensors)
    rest = inventory.stored_bytes - (0 if config.tie_word_embeddings else table)
    return rest + table // config.vocab_size


def kv_read_bytes(
    config: ModelConfig, form: CacheConfig, depth: int, steps: int, number_bytes: int
) -> int:
    """Bytes of keys and values that a token reads, on average over `steps` behind `depth`."""
    full = kv_bytes_per_position(config, CacheConfig(), number_bytes)
    coded = kv_bytes_per_position(config, form, number_bytes)
    read = 0.0
    for positions in range(depth + 1, depth + steps + 1):
        seen = positions if form.bound is None else min(positions, form.bound)
        codes = min(form.flushed(positions), seen)
        read += codes * coded + (seen - codes) * full
    return round(read / steps)
