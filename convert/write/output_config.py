"""The `config.json` of the output: one form that mlx-lm, mlx-swift-lm and this package all read.

Rope stands there flat, as the MLX readers want it, and as `rope_parameters`, because transformers 5
takes a config without them for the 8B's. `quantization_config` is left out: no MLX reader needs the
copy that mlx-lm writes, and transformers refuses it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from apertus_mlx.checkpoint.harmless_keys import INERT_KEYS
from apertus_mlx.convert.plan.plan import DTYPE_NAMES, Plan
from apertus_mlx.quant.spec import QuantSpec

# Keys that would only repeat what is written anew, or that other tools take for instructions.
_NOT_COPIED = {"architectures", "attn_implementation", "is_encoder_decoder", "tokenizer_class"}

_GEOMETRY = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings", "rms_norm_eps",
    "tie_word_embeddings",
)  # fmt: skip
_ROPE_FACTORS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
    ),
}  # fmt: skip


def output_config(plan: Plan, original: Mapping[str, Any]) -> dict[str, Any]:
    """The output's config; `original` is the source's, for keys without a meaning here."""
    config = plan.source.config
    text = original.get("text_config")
    inner = {**original, **text} if isinstance(text, dict) else original
    rope = config.rope
    factors = {key: getattr(rope, key) for key in _ROPE_FACTORS[rope.type]}
    values: dict[str, Any] = {
        key: inner[key] for key in sorted(INERT_KEYS & inner.keys()) if key not in _NOT_COPIED
    }
    values |= {
        "architectures": ["ApertusForCausalLM"],
        "model_type": "apertus",
        "hidden_act": "xielu",
        **{key: getattr(config, key) for key in _GEOMETRY},
        "attention_bias": False,
        "mlp_bias": False,
        "qk_norm": True,
        "post_norm": False,
        "torch_dtype": DTYPE_NAMES[plan.dtype],
        "rope_theta": rope.theta,
        # Both spellings of the type: each reader looks for its own.
        "rope_scaling": {"rope_type": rope.type, "type": rope.type, **factors} if factors else None,
        "rope_parameters": {"rope_theta": rope.theta, "rope_type": rope.type, **factors},
    }
    if config.output_vocab_size != config.vocab_size:
        values["output_vocab_size"] = config.output_vocab_size
    eos = inner["eos_token_id"] if config.eos_token_ids else None
    ids = {
        "bos_token_id": config.bos_token_id,
        "pad_token_id": config.pad_token_id,
        "eos_token_id": eos,
    }
    values |= {key: token_id for key, token_id in ids.items() if token_id is not None}
    block = quantization_block(plan)
    if block is not None:
        values["quantization"] = block
    return dict(sorted(values.items()))


def quantization_block(plan: Plan) -> dict[str, Any] | None:
    """The `quantization` block: the commonest format on top, an entry for each other module.

    None where nothing is quantized.
    """
    specs = plan.specs
    if not specs:
        return None
    default = Counter(specs.values()).most_common(1)[0][0]
    block = _spec_entry(default)
    for matrix in plan.source.layout:
        found = specs.get(matrix.path)
        if found is None:
            block[matrix.path] = False
        elif found != default:
            block[matrix.path] = _spec_entry(found)
    return block


def _spec_entry(spec: QuantSpec) -> dict[str, Any]:
    return {"group_size": spec.group_size, "bits": spec.bits, "mode": spec.mode}
