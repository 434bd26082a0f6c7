"""Prompt caches as `generate --prompt-cache` writes them, in every form of cache.

`models/NAME.expected/FORM.cache.safetensors` holds all of the prompt of `expected.safetensors` but
its last token, computed by MLX in float32.
"""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np

from apertus_mlx.backend.mlx import load_inventory
from apertus_mlx.cache import CacheConfig
from apertus_mlx.checkpoint.inventory import take_inventory
from apertus_mlx.generation.cached_prefix import CachedPrefix
from apertus_mlx.generation.prompt_cache import fingerprint, save_prompt_cache
from tests.swift_fixtures.models import FORMS, FORMS_OF


def write_prompt_cache_fixtures(out: Path) -> None:
    """Write the files described above, beside those of `write_model_fixtures`."""
    for name in FORMS_OF:
        inventory = take_inventory(out / "models" / name)
        beside = out / "models" / f"{name}.expected"
        expected = mx.load(str(beside / "expected.safetensors"))
        assert isinstance(expected, dict)
        ids = [int(token) for token in np.array(expected["ids"])]
        model = load_inventory(inventory, "float32")
        made_with = fingerprint(inventory)
        for case, form in FORMS.items():
            prefix = CachedPrefix(model, CacheConfig(**form))
            prefix.begin(ids).read(len(ids) - 1, step=64)
            save_prompt_cache(beside / f"{case}.cache.safetensors", prefix, made_with)
