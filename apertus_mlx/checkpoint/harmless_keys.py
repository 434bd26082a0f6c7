"""Which keys of a `config.json` cannot change what an Apertus computes.

The rule: a key that nothing reads is accepted if its value is null, if it stands in `INERT_KEYS`
(whatever it says), or in `FIXED_KEYS` at a value that says what Apertus does anyway. Any other may
change the model's meaning and is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from apertus_mlx.errors import RejectedError

# What transformers, MLX and training tools write: descriptions, training, outputs, generation.
INERT_KEYS = frozenset(
    {
        # About the file, the repository and the tools.
        "architectures", "attn_implementation", "finetuning_task", "id2label", "label2id",
        "model_max_length", "prefix", "pretraining_tp", "problem_type", "task_specific_params",
        "tokenizer_class", "transformers_version", "unsloth_fixed", "unsloth_version",
        # Training.
        "attention_dropout", "attn_pdrop", "embd_pdrop", "gradient_checkpointing",
        "hidden_dropout", "hidden_dropout_prob", "initializer_range", "loss_type", "resid_pdrop",
        "tie_encoder_decoder",
        # How a library computes and what it returns, not which values.
        "chunk_size_feed_forward", "is_decoder", "is_encoder_decoder",
        "keys_to_ignore_at_inference", "max_window_layers", "output_attentions",
        "output_hidden_states", "output_scores", "return_dict", "return_dict_in_generate",
        "tf_legacy_loss", "torchscript", "use_bfloat16", "use_cache", "use_return_dict",
        # Generation, which transformers 4 kept in the config; read from generation_config.json.
        "bad_words_ids", "begin_suppress_tokens", "decoder_start_token_id", "diversity_penalty",
        "do_sample", "early_stopping", "encoder_no_repeat_ngram_size",
        "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id",
        "length_penalty", "max_length", "min_length", "no_repeat_ngram_size", "num_beam_groups",
        "num_beams", "num_return_sequences", "remove_invalid_values", "repetition_penalty",
        "sep_token_id", "suppress_tokens", "temperature", "top_k", "top_p", "typical_p",
    }
)  # fmt: skip
# Keys by which a checkpoint asks for its own code to be run; never followed.
CODE_KEYS = frozenset({"auto_map", "model_file", "custom_pipelines", "trust_remote_code"})
# The parts of Apertus 1.5 that are not text.
MULTIMODAL_KEYS = frozenset(
    {
        "audio_config", "audio_token_id", "audio_tokenizer_config", "image_token_id",
        "vision_config", "vision_tokenizer_config",
    }
)  # fmt: skip
# Keys that other model families use; Apertus has them only at these values, or null.
FIXED_KEYS: dict[str, tuple[object, ...]] = {
    "hidden_act": ("xielu",), "mlp_bias": (False,), "attention_bias": (False,),
    "qk_norm": (True,), "post_norm": (False,), "rope_traditional": (False,),
    "partial_rotary_factor": (1.0,), "cross_attention_hidden_size": (),
    "add_cross_attention": (False,), "sliding_window": (), "use_sliding_window": (False,),
    "is_causal": (True,), "pruned_heads": ({},),
}  # fmt: skip
LAYER_TYPES, FULL_ATTENTION = "layer_types", "full_attention"


def refuse_other_models(values: Mapping[str, Any], name: str) -> frozenset[str]:
    """Refuse values that only other models have; returns the keys that this accounts for.

    Raises:
        RejectedError: a key of `FIXED_KEYS` or `layer_types` says something else; names it.
    """
    for key, allowed in FIXED_KEYS.items():
        found = values.get(key)
        if found is not None and found not in allowed:
            implemented = f"only {allowed[0]!r} is" if allowed else "is not"
            raise _not_ours(name, key, found, implemented)
    types = values.get(LAYER_TYPES)
    if types is not None and (
        not isinstance(types, list) or any(kind != FULL_ATTENTION for kind in types)
    ):
        raise _not_ours(name, LAYER_TYPES, types, f"only {FULL_ATTENTION!r} is")
    return frozenset({*FIXED_KEYS, LAYER_TYPES})


def _not_ours(name: str, key: str, found: object, implemented: str) -> RejectedError:
    return RejectedError(
        f"{name}: {key}: {repr(found)[:60]}: not an Apertus we implement "
        f"({implemented} implemented)"
    )
