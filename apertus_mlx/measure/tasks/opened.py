"""A model that is open for as long as tasks run on it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from apertus_mlx.backend.memory_limits import mlx_limits
from apertus_mlx.cache import CacheConfig
from apertus_mlx.generation.memory_plan import plan_memory
from apertus_mlx.generation.model_folder import LoadedModel, open_folder
from apertus_mlx.generation.options import CHAT_CONTEXT, RunOptions
from apertus_mlx.generation.prompt_cache import fingerprint


@dataclass(frozen=True, slots=True)
class OpenModel:
    """A loaded model and what its memory was planned for.

    Attributes:
        context: tokens that a sequence may have; longer ones are cut at their front.
        key: a digest of what its numbers depend on: config, weights, formats, tokenizer, chat
            template, arithmetic and form of cache.
        weight_bytes: of its checkpoint.
    """

    loaded: LoadedModel
    form: CacheConfig
    prefill_step: int
    context: int
    key: str
    weight_bytes: int


@contextmanager
def open_model(
    directory: Path,
    options: RunOptions | None = None,
    context: int | None = None,
    on_bytes: Callable[[int, int], None] | None = None,
) -> Iterator[OpenModel]:
    """Check a folder, plan its memory and load its weights; gives the memory back at the end.

    `context` is 8,192 tokens, or the model's own if that is shorter, by default.

    Raises:
        RejectedError: a file is damaged or not supported.
        ResourceError: too little memory.
    """
    options = options or RunOptions()
    folder = open_folder(directory)
    tokens = min(context or CHAT_CONTEXT, folder.context_length)
    plan = plan_memory(folder.inventory, options, tokens)
    with mlx_limits(plan.buffer_cache_bytes, plan.wired_bytes):
        loaded = folder.load(options, on_bytes)
        depends = (fingerprint(folder.inventory), loaded.model.arithmetic, plan.form, tokens)
        key = hashlib.sha256(repr(depends).encode()).hexdigest()
        size = folder.inventory.checkpoint.size_bytes
        yield OpenModel(loaded, plan.form, plan.prefill_step, tokens, key, size)
