"""What mlx-swift-lm makes of a folder, mirrored from its `Apertus.swift` and `Load.swift`.

Read at mlx-swift-lm 1441444 (2026-08) and tag 3.31.4. The mirror reads the raw JSON with Swift's
own defaults, so that what the two make of it can be compared.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from apertus_mlx.checkpoint import layout
from apertus_mlx.checkpoint.config import ModelConfig
from apertus_mlx.checkpoint.header import TensorInfo
from apertus_mlx.quant.spec import QuantSpec
from apertus_mlx.system.sizes import counted

Level = Literal["error", "warning"]

REQUIRED = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "rms_norm_eps", "vocab_size",
)  # fmt: skip
DEFAULT_THETA = 1_000_000.0
ROPE_TYPES = ("linear", "llama3")
TOLERATED = {"quant_method", "linear_class", "quantization_mode"}
TOKENIZER_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend", "LlamaTokenizer")
# Statements that swift-jinja does not have.
TEMPLATE_GAPS = re.compile(r"{%-?\s*(include|import|from|extends|block|generation|trans)\b")
MAX_SANE_LENGTH = 2**31


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong, or that an app would trip over."""

    level: Level
    where: str
    text: str


def check_config(values: Mapping[str, Any]) -> list[Finding]:
    """What of `config.json` makes Swift's decoder throw."""
    found = []
    for key in REQUIRED:
        value = values.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            found.append(Finding("error", f"config.json: {key}", "Swift needs a number here"))
    if not isinstance(values.get("tie_word_embeddings"), bool):
        found.append(
            Finding("error", "config.json: tie_word_embeddings", "absent: Swift takes it for true")
        )
    scaling = values.get("rope_scaling")
    if scaling is not None:
        kind = scaling.get("type", scaling.get("rope_type")) if isinstance(scaling, dict) else None
        if kind not in ROPE_TYPES or not _is_number(scaling.get("factor")):
            found.append(
                Finding("error", "config.json: rope_scaling", f"Swift does not know {kind!r}")
            )
        elif any(
            not isinstance(value, str) and not _is_number(value) for value in scaling.values()
        ):
            found.append(Finding("error", "config.json: rope_scaling", "holds more than numbers"))
    return found


def check_meaning(config: ModelConfig, values: Mapping[str, Any]) -> list[Finding]:
    """What Swift would compute otherwise than `config` means it; `check_config` found nothing."""
    head_dim = int(values["hidden_size"]) // int(values["num_attention_heads"])
    if config.head_dim != head_dim:
        text = f"{config.head_dim}, but mlx-swift-lm and mlx-lm compute with {head_dim}"
        return [Finding("warning", "config.json: head_dim", text)]
    if config.output_vocab_size != config.vocab_size:
        text = "a head of its own size cannot be expressed in mlx-swift-lm and mlx-lm"
        return [Finding("warning", "config.json: output_vocab_size", text)]
    found, rope = [], config.rope
    scaling = values.get("rope_scaling") or {}
    kind = scaling.get("type", scaling.get("rope_type", "default"))
    meant = (rope.theta, rope.type, rope.factor)
    written = values.get("rope_theta")
    theta = DEFAULT_THETA if written is None else float(written)
    swifts = (theta, kind, float(scaling.get("factor", 1.0)))
    if meant != swifts:
        text = f"Swift computes with {swifts}, the model means {meant}"
        found.append(Finding("error", "config.json: rope_theta, rope_scaling", text))
    if rope.type == "llama3":
        for key in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
            if scaling.get(key) != getattr(rope, key):
                found.append(Finding("error", f"config.json: rope_scaling.{key}", "differs"))
    return found


def check_quantization(values: Mapping[str, Any]) -> tuple[dict[str, Any] | None, list[Finding]]:
    """The `quantization` block; any key that Swift does not know breaks the whole config."""
    block = values.get("quantization")
    if block is None:
        return None, []
    where = "config.json: quantization"
    if not isinstance(block, dict):
        return None, [Finding("error", where, "is not an object")]
    found = []
    for key, value in block.items():
        if key in ("group_size", "bits", "mode") or key in TOLERATED or value is False:
            continue
        if not isinstance(value, dict):
            found.append(Finding("error", f"{where}: {key}", "Swift cannot decode this key"))
        elif value.keys() - {"group_size", "bits", "mode"}:
            found.append(Finding("error", f"{where}: {key}", "has keys that Swift does not know"))
        else:
            found += _check_format(value, f"{where}: {key}")
    found += _check_format(block, where)
    return block, found


def expected_shapes(
    config: ModelConfig, block: Mapping[str, Any] | None, tensors: Mapping[str, TensorInfo]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every parameter of Swift's module map with its shape; quantized is what has scales."""
    yield from layout.vectors(config)
    for matrix in layout.matrices(config):
        path, rows, columns = matrix.path, matrix.rows, matrix.columns
        entry = block.get(path, block) if block is not None else None
        if f"{path}.scales" not in tensors or not isinstance(entry, dict):
            yield matrix.weight, (rows, columns)
            continue
        spec = _spec(entry)
        yield matrix.weight, (rows, spec.packed_columns(columns))
        yield f"{path}.scales", (rows, spec.groups(columns))
        if spec.has_biases:
            yield f"{path}.biases", (rows, spec.groups(columns))


def check_tensors(
    config: ModelConfig, block: Mapping[str, Any] | None, tensors: Mapping[str, TensorInfo]
) -> list[Finding]:
    """Swift loads with `verify: .all`: no key too many, none missing, shapes equal."""
    expected = dict(expected_shapes(config, block, tensors))
    found = []
    for key in sorted(expected.keys() - tensors.keys()):
        found.append(Finding("error", key, "missing: Swift needs every parameter"))
    for key in sorted(tensors.keys() - expected.keys()):
        found.append(Finding("error", key, "Swift has no such parameter"))
    for key in sorted(expected.keys() & tensors.keys()):
        if tensors[key].shape != expected[key]:
            text = f"shape {list(tensors[key].shape)}, Swift expects {list(expected[key])}"
            found.append(Finding("error", key, text))
    wide = [key for key, tensor in tensors.items() if tensor.dtype == "F32"]
    if wide:
        found.append(
            Finding(
                "warning",
                wide[0],
                f"{counted(len(wide), 'tensor is', 'tensors are')} float32, so MLX computes in it",
            )
        )
    return found


def check_tokenizer(values: Mapping[str, Any], template: str | None) -> list[Finding]:
    """`tokenizer_config.json` and the chat template, as swift-transformers reads them."""
    where = "tokenizer_config.json"
    found = []
    if values.get("tokenizer_class") not in TOKENIZER_CLASSES:
        text = f"{values.get('tokenizer_class')!r}: swift-transformers needs {TOKENIZER_CLASSES[0]}"
        found.append(Finding("warning", f"{where}: tokenizer_class", text))
    if values.get("clean_up_tokenization_spaces") is not False:
        text = "not false: swift-transformers then deletes spaces before punctuation"
        found.append(Finding("warning", f"{where}: clean_up_tokenization_spaces", text))
    length = values.get("model_max_length")
    if not _is_number(length) or not 0 < float(length) < MAX_SANE_LENGTH:  # type: ignore[arg-type]
        found.append(Finding("warning", f"{where}: model_max_length", f"{length}: not a length"))
    if template is None:
        found.append(Finding("warning", "chat_template.jinja", "absent: no chat without it"))
    else:
        for name in sorted(set(TEMPLATE_GAPS.findall(template))):
            text = f"uses {{% {name} %}}, which swift-jinja does not have"
            found.append(Finding("warning", "chat_template.jinja", text))
    return found


def _spec(entry: Mapping[str, Any]) -> QuantSpec:
    """The format of an entry; mlx-swift has the same ones as MLX."""
    return QuantSpec(entry["bits"], entry["group_size"], entry.get("mode", "affine"))


def _check_format(entry: Mapping[str, Any], where: str) -> list[Finding]:
    try:
        _spec(entry)
    except (KeyError, TypeError, ValueError):
        bits, size, mode = entry.get("bits"), entry.get("group_size"), entry.get("mode", "affine")
        return [Finding("error", where, f"mlx-swift has no {mode} of {bits} bits, groups {size}")]
    return []


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
