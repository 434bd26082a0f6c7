"""What `apertus-mlx plan` computes of a model, for every form of cache, context and step."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from apertus_mlx.cache.config import CacheConfig
from apertus_mlx.checkpoint.inventory import Inventory
from apertus_mlx.errors import ResourceError, UsageError
from apertus_mlx.memory.fit import fit, largest_context
from apertus_mlx.memory.footprint import choose_backend, footprint, kv_bytes_per_position

FORMS = (
    CacheConfig(), CacheConfig(8, 8), CacheConfig(4, 4), CacheConfig(6, 3), CacheConfig(2, 2),
    CacheConfig(16, 8), CacheConfig(bound=100), CacheConfig(4, 4, bound=256),
    CacheConfig(8, 8, sinks=0, window=32),
)  # fmt: skip
STEPS = (512, 128, 32, 1)


def plans(inventory: Inventory) -> list[dict[str, Any]]:
    """A list of machines with their footprints, largest contexts and choices."""
    return [_plans(inventory, on_gpu) for on_gpu in (True, False)]


def _plans(inventory: Inventory, on_gpu: bool) -> dict[str, Any]:
    backend = choose_backend(inventory, on_gpu)
    config = inventory.config
    longest = config.max_position_embeddings
    footprints = []
    for form in FORMS:
        try:
            form.require_fit(config.head_dim)
        except UsageError:
            continue
        for context in sorted({1, 31, 129, 300, longest // 2, longest}):
            for step in STEPS:
                needed = footprint(inventory, form, context, step, backend)
                footprints.append({
                    "form": {"key_bits": form.key_bits, "value_bits": form.value_bits,
                             "bound": form.bound, "sinks": form.sinks, "window": form.window},
                    "words": str(form), "context": context, "step": step,
                    "per_token": kv_bytes_per_position(config, form, backend.compute_bytes),
                    "parts": [needed.weights_bytes, needed.kv_bytes, needed.prefill_bytes,
                              needed.logits_bytes, needed.total_bytes],
                })  # fmt: skip
    least = min(entry["parts"][4] for entry in footprints)
    most = max(entry["parts"][4] for entry in footprints)
    limits = [10**5, least - 1, *(least + (most - least) * n // 12 for n in range(13)), 10**12]
    choices = []
    for limit in limits:
        for context in (min(300, longest), longest):
            try:
                found = fit(inventory, limit, context, backend, bounds=True)
                chosen: Any = [str(found.form), found.prefill_step, found.footprint.total_bytes,
                               found.buffer_cache_bytes]  # fmt: skip
            except ResourceError:
                chosen = None
            most_tokens = largest_context(inventory, limit, CacheConfig(), 128, backend)
            choices.append(
                {"limit": limit, "context": context, "chosen": chosen, "largest": most_tokens}
            )
    return {
        "on_gpu": on_gpu, "backend": asdict(backend), "footprints": footprints, "choices": choices
    }  # fmt: skip
