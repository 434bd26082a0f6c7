"""Tiny Apertus checkpoints for the converter's tests, written with numpy alone.

Names, shapes and files are those that transformers writes; nothing here uses the code under test.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from benchmarks.make_checkpoint import _byte_letters, to_bf16

SIZES = {"BF16": 2, "F16": 2, "F32": 4, "I32": 4, "U32": 4, "U8": 1, "I8": 1, "F8_E4M3": 1}
SIZES |= {"I64": 8, "BOOL": 1}


@dataclass(frozen=True)
class Raw:
    """One tensor as a safetensors file holds it."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


def raw(array: NDArray[Any], dtype: str | None = None) -> Raw:
    """`array` as a tensor; floats become `dtype` (BF16, F16 or F32)."""
    array = np.asarray(array)
    if dtype == "BF16":
        return Raw("BF16", array.shape, to_bf16(array).tobytes())
    if dtype in ("F16", "F32"):
        kind = np.float16 if dtype == "F16" else np.float32
        return Raw(dtype, array.shape, np.ascontiguousarray(array.astype(kind)).tobytes())
    kinds = {"int32": "I32", "uint32": "U32", "uint8": "U8", "int8": "I8", "int64": "I64",
             "float32": "F32", "float16": "F16", "bool": "BOOL"}  # fmt: skip
    return Raw(dtype or kinds[array.dtype.name], array.shape, np.ascontiguousarray(array).tobytes())


def floats(tensor: Raw) -> NDArray[np.float64]:
    """The values of a float tensor in float64."""
    if tensor.dtype == "BF16":
        bits = np.frombuffer(tensor.data, np.uint16).astype(np.uint32) << 16
        return bits.view(np.float32).astype(np.float64).reshape(tensor.shape)
    kind = {"F16": np.float16, "F32": np.float32}[tensor.dtype]
    return np.frombuffer(tensor.data, kind).astype(np.float64).reshape(tensor.shape)


def write_safetensors(
    path: Path, tensors: Mapping[str, Raw], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file from the format's description."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + len(tensor.data)
        header[name] = {
            "dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]
        }  # fmt: skip
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    data = b"".join(tensor.data for tensor in tensors.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def read_safetensors(path: Path) -> dict[str, Raw]:
    """Read a safetensors file from the format's description."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        start, end = (8 + length + offset for offset in entry["data_offsets"])
        found[name] = Raw(entry["dtype"], tuple(entry["shape"]), content[start:end])
    return found


def read_folder(directory: Path) -> dict[str, Raw]:
    """All tensors of a folder."""
    tensors: dict[str, Raw] = {}
    for path in sorted(directory.glob("*.safetensors")):
        tensors |= read_safetensors(path)
    return tensors


def config(**changes: Any) -> dict[str, Any]:
    """The config of a tiny model in the flat style of transformers 4; None removes a key."""
    values: dict[str, Any] = {
        "architectures": ["ApertusForCausalLM"],
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 68,
        "hidden_act": "xielu",
        "hidden_size": 128,
        "intermediate_size": 256,
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
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 384,
    }
    values.update(changes)
    return {key: value for key, value in values.items() if value is not REMOVED}


REMOVED = object()


def shapes(values: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that transformers stores for a config."""
    hidden, inner = values["hidden_size"], values["intermediate_size"]
    heads, kv_heads = values["num_attention_heads"], values["num_key_value_heads"]
    head_dim = values.get("head_dim") or hidden // heads
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (values["vocab_size"], hidden)
    }
    for index in range(values["num_hidden_layers"]):
        prefix = f"model.layers.{index}"
        found |= {
            f"{prefix}.attention_layernorm.weight": (hidden,),
            f"{prefix}.feedforward_layernorm.weight": (hidden,),
            f"{prefix}.self_attn.q_proj.weight": (heads * head_dim, hidden),
            f"{prefix}.self_attn.k_proj.weight": (kv_heads * head_dim, hidden),
            f"{prefix}.self_attn.v_proj.weight": (kv_heads * head_dim, hidden),
            f"{prefix}.self_attn.o_proj.weight": (hidden, heads * head_dim),
            f"{prefix}.self_attn.q_norm.weight": (head_dim,),
            f"{prefix}.self_attn.k_norm.weight": (head_dim,),
            f"{prefix}.mlp.up_proj.weight": (inner, hidden),
            f"{prefix}.mlp.down_proj.weight": (hidden, inner),
            f"{prefix}.mlp.act_fn.alpha_p": (1,),
            f"{prefix}.mlp.act_fn.alpha_n": (1,),
            f"{prefix}.mlp.act_fn.beta": (),
            f"{prefix}.mlp.act_fn.eps": (),
        }
    found["model.norm.weight"] = (hidden,)
    if not values["tie_word_embeddings"]:
        rows = values.get("output_vocab_size") or values["vocab_size"]
        found["lm_head.weight"] = (rows, hidden)
    return found


def random_tensors(values: Mapping[str, Any], dtype: str = "BF16", seed: int = 0) -> dict[str, Raw]:
    """Random weights for a config."""
    rng = np.random.default_rng(seed)
    constants = {"alpha_p": 0.2, "alpha_n": -1.05, "beta": 0.5, "eps": -1e-6}
    tensors = {}
    for name, shape in shapes(values).items():
        last = name.rsplit(".", 1)[-1]
        if last in constants:
            array = np.full(shape, constants[last], np.float32)
        elif len(shape) == 1:
            array = 1 + 0.1 * rng.standard_normal(shape)
        else:
            array = 0.05 * rng.standard_normal(shape)
        tensors[name] = raw(array, dtype)
    return tensors


def write_tokenizer(directory: Path, special_tokens: int = 74) -> None:
    """A byte-level tokenizer of `special_tokens` + 256 entries, and the files beside it."""
    special = [f"<SPECIAL_{index}>" for index in range(special_tokens)]
    special[:4] = ["<unk>", "<s>", "</s>", "<pad>"]
    vocab = {token: index for index, token in enumerate(special + _byte_letters())}
    added = [
        {"id": index, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True}
        for index, token in enumerate(special)
    ]  # fmt: skip
    byte_level = {
        "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False
    }  # fmt: skip
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
        "normalizer": None, "pre_tokenizer": byte_level, "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None,
                  "continuing_subword_prefix": None, "end_of_word_suffix": None,
                  "fuse_unk": False, "byte_fallback": False, "ignore_merges": True,
                  "vocab": vocab, "merges": []},
    }  # fmt: skip
    write_json(directory / "tokenizer.json", tokenizer)
    write_json(
        directory / "tokenizer_config.json",
        {
            "bos_token": "<s>", "eos_token": "</s>", "clean_up_tokenization_spaces": False,
            "model_max_length": 512, "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )  # fmt: skip
    write_json(
        directory / "generation_config.json", {"bos_token_id": 1, "eos_token_id": [2, 68, 72]}
    )
    (directory / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0]['content'] }}")


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False), encoding="utf-8")


def write_checkpoint(
    directory: Path,
    values: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Raw] | None = None,
    shards: int = 1,
    seed: int = 0,
) -> Path:
    """A complete folder: config, weights (with an index where there are shards), tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    values = config() if values is None else values
    tensors = random_tensors(values, seed=seed) if tensors is None else tensors
    write_json(directory / "config.json", values)
    write_tokenizer(directory)
    if shards == 1:
        write_safetensors(directory / "model.safetensors", tensors, {"format": "pt"})
        return directory
    names = list(tensors)
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = names[number::shards]
        write_safetensors(directory / file, {name: tensors[name] for name in part})
        weight_map |= dict.fromkeys(part, file)
    total = sum(len(tensor.data) for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(directory / "model.safetensors.index.json", index)
    return directory


def dequantize_affine(
    weight: Raw, scales: Raw, biases: Raw, bits: int, group_size: int
) -> NDArray[np.float64]:
    """MLX's affine format in float64, from its description: codes packed from the lowest bit on."""
    rows = weight.shape[0]
    words = np.frombuffer(weight.data, np.uint8).reshape(rows, -1)
    stream = np.unpackbits(words, axis=1, bitorder="little")
    codes = stream.reshape(rows, -1, bits) @ (1 << np.arange(bits))
    scale = np.repeat(floats(scales), group_size, axis=1)
    bias = np.repeat(floats(biases), group_size, axis=1)
    return scale * codes + bias


def tree(directory: Path) -> dict[str, bytes]:
    """Every file below `directory` with its bytes."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def as_mlx(tensor: Raw) -> mx.array:
    """The tensor as an MLX array of its own type."""
    kinds = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32, "U32": np.uint32,
             "U8": np.uint8}  # fmt: skip
    array = mx.array(np.frombuffer(tensor.data, kinds[tensor.dtype]).reshape(tensor.shape))
    return array.view(mx.bfloat16) if tensor.dtype == "BF16" else array
