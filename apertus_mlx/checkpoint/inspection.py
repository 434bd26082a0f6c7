"""What a checkpoint is, as plain values: geometry, sizes, quantization, context, control tokens."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from apertus_mlx.checkpoint import layout
from apertus_mlx.checkpoint.generation_config import read_generation_config
from apertus_mlx.checkpoint.inventory import Inventory, take_inventory
from apertus_mlx.checkpoint.matching import FLOAT_DTYPES
from apertus_mlx.text.roles import Role
from apertus_mlx.text.tokenizer import Tokenizer

_GEOMETRY = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "tie_word_embeddings",
)  # fmt: skip


def inspect_checkpoint(directory: Path) -> dict[str, Any]:
    """Report on the model folder `directory`; no weight is read.

    Raises:
        NotFoundError, RejectedError: see `take_inventory` and `Tokenizer.load`.
    """
    inventory = take_inventory(directory)
    config = inventory.config
    tokenizer = Tokenizer.load(
        directory, vocab_size=config.vocab_size, bos_token_id=config.bos_token_id
    )
    generation = read_generation_config(directory, config.vocab_size)
    parameters = layout.parameter_count(config)
    weight_bytes = inventory.stored_bytes
    kv_values = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return {
        "directory": str(directory),
        "parameters": parameters,
        "weights_bytes": weight_bytes,
        "bits_per_weight": 8 * weight_bytes / parameters,
        "context_tokens": config.max_position_embeddings,
        "kv_cache_per_token_16_bit_bytes": 2 * kv_values,
        "geometry": {
            **{name: getattr(config, name) for name in _GEOMETRY},
            "rope_type": config.rope.type,
            "rope_theta": config.rope.theta,
            "rope_factor": config.rope.factor,
        },
        "weights": _formats(inventory),
        "stop_ids": list(generation.eos_token_ids or config.eos_token_ids),
        "control_tokens": {
            role.name.lower(): [f"{i} {tokenizer.id_to_token(i)}" for i in (role.start, role.end)]
            for role in Role
        },
        "not_used": inventory.dropped,
    }


def _formats(inventory: Inventory) -> dict[str, str]:
    """How the matrices are stored, each form with where it is used."""
    forms: dict[str, list[str]] = {}
    for path, matrix in inventory.matrices.items():
        form = str(matrix.spec or matrix.tensors[0].dtype)
        forms.setdefault(form, []).append(path.rsplit(".", 1)[-1])
    result = {
        form: ", ".join(f"{count} {name}" for name, count in sorted(Counter(paths).items()))
        for form, paths in forms.items()
    }
    scales = {
        tensor.dtype
        for matrix in inventory.matrices.values()
        for tensor in matrix.tensors[1:2]
        if tensor.dtype in FLOAT_DTYPES
    }
    return {**result, **({"scales": ", ".join(sorted(scales))} if scales else {})}
