"""`config.json` of an Apertus checkpoint, in any of its styles, as one frozen value.

Reads the flat style of transformers 4 (and of MLX folders), the `rope_parameters` style of
transformers 5, and the nested `text_config` of Apertus 1.5. Whatever is not implemented is
refused by name: a wrong default computes nonsense in silence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from apertus_mlx.checkpoint.config_keys import KeyReader
from apertus_mlx.checkpoint.harmless_keys import (
    CODE_KEYS,
    INERT_KEYS,
    MULTIMODAL_KEYS,
    refuse_other_models,
)
from apertus_mlx.checkpoint.quantization_block import Foreign, Quantization, parse_quantization
from apertus_mlx.checkpoint.rope import MAX_CONTEXT, parse_rope
from apertus_mlx.checkpoint.rope import Rope as Rope
from apertus_mlx.errors import NotFoundError, RejectedError
from apertus_mlx.system.model_files import exists
from apertus_mlx.system.strict_json import read_object

Family = Literal["apertus", "apertus1p5"]

CONFIG_FILE = "config.json"
MODEL_TYPES: dict[str, Family] = {
    "apertus": "apertus",
    "apertus1p5": "apertus1p5",
    "apertus1p5_text": "apertus1p5",
}
DTYPES = ("bfloat16", "float16", "float32")

# Bounds that no released model comes near; beyond them a config is damaged or hostile.
MAX_WIDTH = 2**20
SIZES = {
    "hidden_size": MAX_WIDTH, "intermediate_size": MAX_WIDTH, "num_attention_heads": MAX_WIDTH,
    "num_hidden_layers": 1024, "vocab_size": 2**22, "max_position_embeddings": MAX_CONTEXT,
}  # fmt: skip
# Below the smallest normal float32 an epsilon is none, and rows of zeros become NaN.
MIN_EPS = 1.2e-38


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Everything that the shapes and the forward pass of an Apertus model depend on."""

    family: Family
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    output_vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    rope: Rope
    dtype: str | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    quantization: Quantization | None = None
    # `quantization_config` of a format that is not MLX's: (method, block), for the converter.
    foreign_quantization: Foreign | None = None
    asks_for_code: tuple[str, ...] = ()


def read_config(directory: Path) -> ModelConfig:
    """Read `directory/config.json`.

    Raises:
        NotFoundError: there is no such folder.
        RejectedError: the file is missing or damaged, or describes a model that is not an
            Apertus that this package implements; the message names the key.
    """
    if not directory.is_dir():
        raise NotFoundError(f"{directory}: no such folder")
    path = directory / CONFIG_FILE
    if not exists(path):
        weights = any(directory.glob("*.safetensors"))
        found = "" if weights else " and no *.safetensors"
        raise RejectedError(f"{directory}: no config.json{found}; not a model folder")
    return parse_config(read_object(path), str(path))


def parse_config(values: Mapping[str, Any], name: str = CONFIG_FILE) -> ModelConfig:
    """Parse the contents of a `config.json`; `name` is what error messages call it."""
    asks_for_code = tuple(sorted(CODE_KEYS & values.keys()))
    outer = KeyReader(values, name)
    model_type = outer.text("model_type")
    if model_type not in MODEL_TYPES:
        raise RejectedError(
            f"{name}: model_type: {model_type[:60]!r} is not supported; this package runs 'apertus'"
        )
    text = outer.mapping("text_config")
    keys = outer
    if text is not None:
        outer.ignore(INERT_KEYS | MULTIMODAL_KEYS | CODE_KEYS | _TEXT_KEYS_REPEATED_OUTSIDE)
        outer.refuse_unread()
        # Keys beside text_config hold for the whole model, unless the text part repeats them.
        shared = {key: values[key] for key in _TEXT_KEYS_REPEATED_OUTSIDE if key in values}
        values = {**shared, **text}
        keys = KeyReader(values, f"{name}: text_config")
        inner_type = keys.optional_text("model_type") or model_type
        if MODEL_TYPES.get(inner_type) != MODEL_TYPES[model_type]:
            raise RejectedError(f"{name}: text_config.model_type: {inner_type[:60]!r} is not text")
    config = _parse_model(keys, MODEL_TYPES[model_type], values, name)
    keys.ignore(INERT_KEYS | CODE_KEYS | MULTIMODAL_KEYS)
    keys.refuse_unread()
    return replace(config, asks_for_code=asks_for_code)


_TEXT_KEYS_REPEATED_OUTSIDE = frozenset(
    {
        "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "dtype",
        "torch_dtype", "quantization", "quantization_config", "output_vocab_size", "vocab_size",
    }
)  # fmt: skip


def _parse_model(
    keys: KeyReader, family: Family, values: Mapping[str, Any], name: str
) -> ModelConfig:
    keys.ignore(refuse_other_models(values, name))

    sizes: dict[str, Any] = {key: keys.integer(key, 1, most) for key, most in SIZES.items()}
    hidden_size, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    vocab_size = sizes["vocab_size"]
    kv_heads = keys.optional_integer("num_key_value_heads", 1, MAX_WIDTH) or heads
    if heads % kv_heads:
        raise RejectedError(
            f"{name}: num_key_value_heads: {kv_heads} does not divide num_attention_heads ({heads})"
        )
    if "head_dim" not in keys and hidden_size % heads:
        raise RejectedError(
            f"{name}: num_attention_heads: {heads} does not divide hidden_size ({hidden_size}), "
            "and there is no head_dim"
        )
    head_dim = keys.optional_integer("head_dim", 2, MAX_WIDTH) or hidden_size // heads
    if head_dim % 2:
        raise RejectedError(f"{name}: head_dim: {head_dim} is odd; rotary embedding needs pairs")
    output_vocab_size = keys.optional_integer("output_vocab_size", 1, vocab_size) or vocab_size
    tied = keys.optional_boolean("tie_word_embeddings") or False
    if tied and output_vocab_size != vocab_size:
        raise RejectedError(
            f"{name}: output_vocab_size: {output_vocab_size} with tied embeddings of "
            f"{vocab_size} rows is not implemented"
        )
    quantization, foreign = parse_quantization(keys, name)
    return ModelConfig(
        family=family,
        **sizes,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        output_vocab_size=output_vocab_size,
        rms_norm_eps=keys.number("rms_norm_eps", MIN_EPS, 1.0),
        tie_word_embeddings=tied,
        rope=parse_rope(keys, values, name),
        dtype=_parse_dtype(keys, name),
        bos_token_id=keys.optional_integer("bos_token_id", 0, vocab_size - 1),
        eos_token_ids=keys.integers("eos_token_id", 0, vocab_size - 1),
        pad_token_id=_parse_pad(keys, vocab_size),
        quantization=quantization,
        foreign_quantization=foreign,
    )


def _parse_dtype(keys: KeyReader, name: str) -> str | None:
    dtype = keys.either_text("dtype", "torch_dtype")
    if dtype and dtype.removeprefix("torch.") not in DTYPES:
        raise RejectedError(f"{name}: dtype: {dtype[:60]!r}: expected {', '.join(DTYPES)}")
    return dtype.removeprefix("torch.") if dtype else None


def _parse_pad(keys: KeyReader, vocab_size: int) -> int | None:
    """The padding token; -1 is how some tools write that there is none."""
    found = keys.optional_integer("pad_token_id", -1, vocab_size - 1)
    return None if found == -1 else found
