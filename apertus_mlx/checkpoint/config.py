"""`config.json` of an Apertus checkpoint, in any of its styles, as one frozen value.

Reads the flat style of transformers 4 (and of MLX folders), the `rope_parameters` style of
transformers 5, and the nested `text_config` of Apertus 1.5. Whatever is not implemented is
refused by name: a wrong default computes nonsense in silence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from apertus_mlx.checkpoint.config_keys import KeyReader
from apertus_mlx.errors import NotFoundError, RejectedError
from apertus_mlx.quant.spec import QuantSpec
from apertus_mlx.system.model_files import exists
from apertus_mlx.system.strict_json import read_object

Family = Literal["apertus", "apertus1p5"]
RopeType = Literal["default", "linear", "llama3"]

CONFIG_FILE = "config.json"
MODEL_TYPES: dict[str, Family] = {
    "apertus": "apertus",
    "apertus1p5": "apertus1p5",
    "apertus1p5_text": "apertus1p5",
}
DTYPES = ("bfloat16", "float16", "float32")

# Bounds that no released model comes near; beyond them a config is damaged or hostile.
MAX_WIDTH, MAX_CONTEXT = 2**20, 2**24
SIZES = {
    "hidden_size": MAX_WIDTH, "intermediate_size": MAX_WIDTH, "num_attention_heads": MAX_WIDTH,
    "num_hidden_layers": 1024, "vocab_size": 2**22, "max_position_embeddings": MAX_CONTEXT,
}  # fmt: skip
# Below the smallest normal float32 an epsilon is none, and rows of zeros become NaN.
MIN_EPS = 1.2e-38
# With a base up to 1 no pair turns more slowly than a radian for each token.
MIN_THETA, MAX_THETA = 1.0, 1e12
# Of positions; below it those of a long context are beyond what float32 tells apart.
FACTOR_RANGE = 1e-3, 1e6

FACTORS: dict[RopeType, tuple[str, ...]] = {
    "default": (), "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}  # fmt: skip

# Keys that transformers, MLX and training tools write and that do not change the forward pass.
INERT_KEYS = frozenset(
    {
        "architectures", "attention_dropout", "attn_implementation", "bad_words_ids",
        "chunk_size_feed_forward", "hidden_dropout", "id2label", "initializer_range",
        "is_decoder", "is_encoder_decoder", "keys_to_ignore_at_inference", "label2id",
        "max_length", "min_length", "model_max_length", "output_attentions",
        "output_hidden_states", "pretraining_tp", "problem_type", "return_dict", "tokenizer_class",
        "transformers_version", "unsloth_fixed", "use_bfloat16", "use_cache",
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
# Keys that other model families use; Apertus has them only at these values.
FIXED_KEYS: dict[str, tuple[object, ...]] = {
    "hidden_act": ("xielu",), "mlp_bias": (False,), "attention_bias": (False,),
    "qk_norm": (True,), "post_norm": (False,), "rope_traditional": (False,),
    "partial_rotary_factor": (1.0,), "cross_attention_hidden_size": (),
    "add_cross_attention": (False,), "sliding_window": (), "use_sliding_window": (False,),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding: base and, for `linear` and `llama3`, how it is scaled."""

    theta: float
    type: RopeType = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True, slots=True)
class Quantization:
    """The `quantization` block of an MLX folder: one default and per-module exceptions."""

    default: QuantSpec
    overrides: Mapping[str, QuantSpec | None] = field(default_factory=lambda: MappingProxyType({}))

    def spec_for(self, path: str) -> QuantSpec | None:
        """The format of the module at `path`; None where the block says it stays unquantized."""
        return self.overrides.get(path, self.default)


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
    foreign_quantization: tuple[str, Mapping[str, Any]] | None = None
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
    for key, allowed in FIXED_KEYS.items():
        found = values.get(key)
        if found is not None and found not in allowed:
            implemented = f"only {allowed[0]!r} is" if allowed else "is not"
            raise RejectedError(
                f"{name}: {key}: {found!r}: not an Apertus we implement ({implemented} implemented)"
            )
    keys.ignore(FIXED_KEYS.keys())

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
    quantization, foreign = _parse_quantization(keys, name)
    return ModelConfig(
        family=family,
        **sizes,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        output_vocab_size=output_vocab_size,
        rms_norm_eps=keys.number("rms_norm_eps", MIN_EPS, 1.0),
        tie_word_embeddings=tied,
        rope=_parse_rope(keys, name),
        dtype=_parse_dtype(keys, name),
        bos_token_id=keys.optional_integer("bos_token_id", 0, vocab_size - 1),
        eos_token_ids=keys.integers("eos_token_id", 0, vocab_size - 1),
        pad_token_id=keys.optional_integer("pad_token_id", 0, vocab_size - 1),
        quantization=quantization,
        foreign_quantization=foreign,
    )


def _parse_dtype(keys: KeyReader, name: str) -> str | None:
    dtype = _text_of(keys, "dtype", "torch_dtype", name)
    if dtype and dtype.removeprefix("torch.") not in DTYPES:
        raise RejectedError(f"{name}: dtype: {dtype[:60]!r}: expected {', '.join(DTYPES)}")
    return dtype.removeprefix("torch.") if dtype else None


def _text_of(keys: KeyReader, new_key: str, old_key: str, name: str) -> str | None:
    """A text under one of two keys, or the same under both."""
    new, old = keys.optional_text(new_key), keys.optional_text(old_key)
    if new and old and new != old:
        raise RejectedError(f"{name}: {new_key} {new!r} and {old_key} {old!r} disagree")
    return new or old


def _parse_rope(keys: KeyReader, name: str) -> Rope:
    """Rope from `rope_parameters` (transformers 5) and/or `rope_theta` with `rope_scaling`."""
    flat_theta = keys.optional_number("rope_theta", MIN_THETA, MAX_THETA)
    new = keys.mapping("rope_parameters")
    old = keys.mapping("rope_scaling")
    readings = []
    if new is not None:
        readings.append(_parse_rope_block(new, flat_theta, f"{name}: rope_parameters"))
    if old is not None or new is None:
        readings.append(_parse_rope_block(old or {}, flat_theta, f"{name}: rope_scaling"))
    if len(readings) == 2 and readings[0] != readings[1]:
        raise RejectedError(f"{name}: rope_parameters and rope_scaling disagree")
    if flat_theta is not None and readings[0].theta != flat_theta:
        raise RejectedError(
            f"{name}: rope_theta {flat_theta} and rope_parameters.rope_theta "
            f"{readings[0].theta} disagree"
        )
    return readings[0]


def _parse_rope_block(block: Mapping[str, Any], flat_theta: float | None, name: str) -> Rope:
    keys = KeyReader(block, name)
    kind: Any = _text_of(keys, "rope_type", "type", name) or "default"
    if kind not in FACTORS:
        raise RejectedError(
            f"{name}: rope_type: {kind[:60]!r} is not implemented; "
            "Apertus uses default, linear or llama3"
        )
    theta = keys.optional_number("rope_theta", MIN_THETA, MAX_THETA) or flat_theta
    if theta is None:
        raise RejectedError(f"{name}: rope_theta: missing; the rotary base cannot be guessed")
    # transformers keeps a factor of 1 beside the default type.
    if kind == "default" and keys.optional_number("factor", *FACTOR_RANGE) not in (None, 1):
        raise RejectedError(f"{name}: factor: has no meaning without a rope_type")
    scaling: dict[str, Any] = {key: keys.number(key, *FACTOR_RANGE) for key in FACTORS[kind]}
    if kind == "llama3":
        key = "original_max_position_embeddings"
        scaling[key] = keys.integer(key, 1, MAX_CONTEXT)
        if scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
            raise RejectedError(f"{name}: high_freq_factor: must exceed low_freq_factor")
    keys.refuse_unread()
    return Rope(theta, kind, **scaling)


def _parse_quantization(
    keys: KeyReader, name: str
) -> tuple[Quantization | None, tuple[str, Mapping[str, Any]] | None]:
    """MLX's `quantization` block, or the block of another format under `quantization_config`."""
    block = keys.mapping("quantization")
    other = keys.mapping("quantization_config")
    if other is not None and "quant_method" in other and not {"bits", "group_size"} <= other.keys():
        if block is not None:
            raise RejectedError(f"{name}: quantization and quantization_config disagree")
        return None, (str(other["quant_method"]), other)
    if other is not None and other.get("quant_method") in ("gptq", "awq"):
        return None, (str(other["quant_method"]), other)
    if block is not None and other is not None and dict(block) != dict(other):
        raise RejectedError(f"{name}: quantization and quantization_config disagree")
    block = block if block is not None else other
    if block is None:
        return None, None
    return _parse_mlx_quantization(block, f"{name}: quantization"), None


def _parse_mlx_quantization(block: Mapping[str, Any], name: str) -> Quantization:
    keys = KeyReader(block, name)
    default = _parse_spec(keys, name)
    keys.ignore({"quant_method", "linear_class", "quantization_mode"})
    overrides: dict[str, QuantSpec | None] = {}
    for path, value in block.items():
        if value is False:
            overrides[path] = None
        elif isinstance(value, dict):
            inner = KeyReader(value, f"{name}.{path[:80]}")
            overrides[path] = _parse_spec(inner, f"{name}.{path[:80]}")
            inner.refuse_unread()
        elif value is True:
            overrides[path] = default
        else:
            continue
        keys.ignore({path})
    keys.refuse_unread()
    return Quantization(default, MappingProxyType(overrides))


def _parse_spec(keys: KeyReader, name: str) -> QuantSpec:
    mode: Any = keys.optional_text("mode") or "affine"
    try:
        return QuantSpec(
            bits=keys.integer("bits", 1, 64),
            group_size=keys.integer("group_size", 1, 2**20),
            mode=mode,
        )
    except ValueError as error:
        raise RejectedError(f"{name}: {error}") from None
