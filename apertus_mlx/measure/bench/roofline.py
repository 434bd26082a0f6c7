"""The roofline of decoding: bytes that a token has to read, and the memory's bandwidth."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from apertus_mlx.backend.hardware import has_gpu, processors
from apertus_mlx.cache.config import CacheConfig
from apertus_mlx.checkpoint import layout
from apertus_mlx.checkpoint.config import ModelConfig
from apertus_mlx.checkpoint.inventory import Inventory
from apertus_mlx.memory.devices import published_bandwidth
from apertus_mlx.memory.footprint import kv_bytes_per_position

# More than any cache holds; moved so many times, of which the fastest counts.
MOVED_BYTES, REPEATS = 2**28, 6
# A GPU copies it often enough in one evaluation that starting one does not count: so long, or so
# often.
LONG_ENOUGH_S, MOST_COPIES = 0.02, 256


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """In bytes per second; `published` is None for a chip that the table does not have."""

    published: float | None
    measured: float

    @property
    def reference(self) -> float:
        """What rooflines refer to."""
        return self.published or self.measured


def find_bandwidth(chip: str, ram_bytes: int) -> Bandwidth:
    """Of this machine, whose chip MLX calls `chip`; measuring takes a second."""
    return Bandwidth(published_bandwidth(chip, ram_bytes), _on_gpu() if has_gpu() else _on_cpu())


def _on_gpu() -> float:
    """Of copies one after the other; each reads half of the bytes and writes as many."""
    source = mx.random.uniform(shape=(MOVED_BYTES // 8,))
    mx.eval(source)

    def move(copies: int) -> None:
        copied = source
        for _ in range(copies):
            copied = copied + 1
        mx.eval(copied)

    move(1)  # compiles the kernel
    return long_copies(move, time.perf_counter)


def long_copies(move: Callable[[int], None], clock: Callable[[], float]) -> float:
    """Bytes per second of `move(copies)`, with as many copies as take long enough by `clock`."""
    copies = 1
    while True:
        started = clock()
        move(copies)
        if clock() - started >= LONG_ENOUGH_S or copies >= MOST_COPIES:
            break
        copies *= 2
    return copies * _best(lambda: move(copies), clock)


def _on_cpu() -> float:
    """Of all cores reading at once."""
    cores = processors()
    parts = np.array_split(np.ones(MOVED_BYTES // 4, np.float32), cores)
    with ThreadPoolExecutor(cores) as pool:
        return _best(lambda: list(pool.map(np.max, parts)))


def _best(move: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    times = []
    for _ in range(REPEATS):
        started = clock()
        move()
        times.append(clock() - started)
    return MOVED_BYTES / min(times)


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
