"""What a manifest tells an app, so that it need not find it out: shape, memory, form of prompts."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from apertus_mlx.checkpoint import layout
from apertus_mlx.checkpoint.config import ModelConfig
from apertus_mlx.checkpoint.inventory import Inventory, take_inventory
from apertus_mlx.convert.write.template_version import describe_template
from apertus_mlx.memory.fit import possible_forms
from apertus_mlx.memory.footprint import choose_backend, kv_bytes_per_position, weights_bytes

_SHAPE = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "output_vocab_size",
    "max_position_embeddings", "tie_word_embeddings",
)  # fmt: skip


def app_facts(directory: Path) -> dict[str, Any]:
    """`architecture`, `memory` and the chat template's version of the written folder `directory`.

    Raises:
        RejectedError: its files are damaged.
    """
    inventory = take_inventory(directory)
    version, default_system = describe_template(directory, inventory.config)
    return {
        "architecture": architecture(inventory.config),
        "memory": memory_terms(inventory),
        "chat_template": version,
        "default_system": default_system,
    }


def architecture(config: ModelConfig) -> dict[str, Any]:
    """The numbers of a config by its own names, and that of parameters."""
    values = {key: getattr(config, key) for key in _SHAPE}
    return {**values, "parameters": layout.parameter_count(config)}


def memory_terms(inventory: Inventory) -> dict[str, Any]:
    """What the memory plan on an Apple GPU is computed from, see `memory/footprint.py`.

    `kv_bytes_per_token` is for each width of a cache; the other numbers are the factors of working
    memory.
    """
    backend = choose_backend(inventory, on_gpu=True)
    factors = asdict(backend)
    for other in ("cpu", "is_card", "longest_step", "embedding_on_disk"):
        del factors[other]
    forms = possible_forms(inventory.config)
    return {
        "weights_bytes": weights_bytes(inventory, backend.compute_bytes),
        "kv_bytes_per_token": {
            str(form.key_bits): kv_bytes_per_position(inventory.config, form, backend.compute_bytes)
            for form in forms
        },
        **factors,
    }
