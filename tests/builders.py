"""Tiny Apertus checkpoints, written the way Hugging Face and MLX write them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from apertus_mlx.checkpoint import layout
from apertus_mlx.checkpoint.config import ModelConfig, parse_config
from apertus_mlx.checkpoint.header import TensorInfo
from apertus_mlx.checkpoint.inventory import Inventory, StoredMatrix
from apertus_mlx.checkpoint.tensors import Checkpoint
from apertus_mlx.quant.spec import QuantSpec

CONTROL_NAMES = {
    0: "<unk>", 1: "<s>", 2: "</s>", 3: "<pad>", 32: "<think>", 33: "</think>",
    61: "<|system_start|>", 62: "<|system_end|>", 63: "<|developer_start|>",
    64: "<|developer_end|>", 65: "<|user_start|>", 66: "<|user_end|>", 67: "<|assistant_start|>",
    68: "<|assistant_end|>", 69: "<|inner_prefix|>", 70: "<|inner_suffix|>",
    71: "<|tools_prefix|>", 72: "<|tools_suffix|>",
}  # fmt: skip
FIRST_BYTE_ID = 74
TEMPLATE = """{{ bos_token }}{% for message in messages %}\
{% if message.role == "user" %}<|user_start|>{{ message.content }}<|user_end|>\
{% elif message.role == "system" %}<|system_start|>{{ message.content }}<|system_end|>\
{% else %}<|assistant_start|>{{ message.content }}<|assistant_end|>{% endif %}{% endfor %}\
{% if add_generation_prompt %}<|assistant_start|>{% endif %}"""


def config_4x(**changes: Any) -> dict[str, Any]:
    """A config in the flat style of transformers 4, as the released 8B carries it."""
    config: dict[str, Any] = {
        "architectures": ["ApertusForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": [2, 68, 72],
        "hidden_act": "xielu",
        "hidden_size": 64,
        "initializer_range": 0.02,
        "intermediate_size": 128,
        "max_position_embeddings": 512,
        "mlp_bias": False,
        "model_type": "apertus",
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "pad_token_id": 3,
        "post_norm": False,
        "qk_norm": True,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 500000,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "transformers_version": "4.56.1",
        "use_cache": True,
        "vocab_size": 384,
    }
    return {**config, **changes}


LLAMA3 = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 64,
    "rope_type": "llama3",
    "type": "llama3",
}


def config_5x(**changes: Any) -> dict[str, Any]:
    """A config in the style of transformers 5: `rope_parameters`, fewer legacy keys."""
    config = config_4x(**changes)
    scaling = config.pop("rope_scaling") or {"rope_type": "default"}
    config["rope_parameters"] = {**scaling, "rope_theta": config.pop("rope_theta")}
    config["dtype"] = config.pop("torch_dtype")
    for key in ("mlp_bias", "post_norm", "qk_norm"):
        del config[key]
    return {**config, "transformers_version": "5.23.0"}


def random_weights(config: Mapping[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Float32 weights with Hugging Face names, scaled so that logits are of order one."""
    rng = np.random.default_rng(seed)
    parsed = parse_config(config)
    weights = {
        matrix.weight: rng.standard_normal((matrix.rows, matrix.columns)) / matrix.columns**0.5
        for matrix in layout.matrices(parsed)
    }
    for name, shape in layout.vectors(parsed):
        if name.endswith("norm.weight"):
            weights[name] = 1 + 0.2 * rng.standard_normal(shape)
        elif name.endswith(layout.ALPHAS):
            weights[name] = rng.uniform(-1.5, 1.5, shape)
        else:
            weights[name] = np.full(shape, 0.5 if name.endswith("beta") else -1e-6)
    return {name: np.asarray(weight, np.float32) for name, weight in weights.items()}


def planned_inventory(
    name: str,
    config: ModelConfig,
    spec: QuantSpec | None,
    dtype: str = "BF16",
    tokenizer_bytes: int | None = None,
) -> Inventory:
    """A model that nobody has written, as the memory planner sees one: all matrices in `spec`."""
    matrices = {
        matrix.path: StoredMatrix(
            matrix.path, matrix.rows, matrix.columns, spec,
            (TensorInfo(matrix.weight, dtype, (matrix.rows, matrix.columns), "", 0, 0),),
        )
        for matrix in layout.matrices(config)
    }  # fmt: skip
    checkpoint = Checkpoint(name, (), {}, None)
    return Inventory(config, checkpoint, matrices, {}, {}, tokenizer_bytes=tokenizer_bytes)


def write_checkpoint(
    directory: Path,
    config: Mapping[str, Any],
    weights: Mapping[str, np.ndarray | mx.array] | None = None,
    *,
    dtype: mx.Dtype = mx.float32,
    shards: int = 1,
    tokenizer: bool = True,
) -> Path:
    """Write a folder as `save_pretrained` does; returns it."""
    directory.mkdir(parents=True, exist_ok=True)
    weights = random_weights(config) if weights is None else weights
    arrays = {name: _stored(mx.array(value), dtype) for name, value in weights.items()}
    names = list(arrays)
    files = {}
    for index in range(shards):
        file = "model.safetensors"
        if shards > 1:
            file = f"model-{index + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: arrays[name] for name in names[index::shards]}
        mx.save_safetensors(str(directory / file), part, {"format": "pt"})
        files.update(dict.fromkeys(part, file))
    if shards > 1:
        total = sum(array.nbytes for array in arrays.values())
        index_json = {"metadata": {"total_size": total}, "weight_map": files}
        write_json(directory / "model.safetensors.index.json", index_json)
    write_json(directory / "config.json", config)
    if tokenizer:
        write_tokenizer(directory, int(config["vocab_size"]))
    return directory


def _stored(array: mx.array, dtype: mx.Dtype) -> mx.array:
    return array.astype(dtype) if mx.issubdtype(array.dtype, mx.floating) else array


def write_tokenizer(directory: Path, vocab_size: int) -> None:
    """A byte-level tokenizer without merges: ids as in Apertus v1, then the 256 bytes."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [CONTROL_NAMES.get(i, f"<SPECIAL_{i}>") for i in range(FIRST_BYTE_ID)]
    vocab = {token: i for i, token in enumerate([*tokens, *alphabet])}
    vocab.update({f"<extra_{i}>": i for i in range(len(vocab), vocab_size)})
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in tokens])
    tokenizer.save(str(directory / "tokenizer.json"))
    write_json(
        directory / "tokenizer_config.json",
        {
            "bos_token": "<s>",
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|assistant_end|>",
            "pad_token": "<pad>",
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": "<unk>",
        },
    )
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    write_json(
        directory / "generation_config.json",
        {"bos_token_id": 1, "eos_token_id": [2, 68, 72], "pad_token_id": 3},
    )


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2))
