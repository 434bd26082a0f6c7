"""What mlx-swift-lm makes of a folder, mirrored from its `Apertus.swift` and `Load.swift`.

Read at mlx-swift-lm 1441444 (2026-08) and tag 3.31.4. The mirror reads the raw JSON with Swift's
own defaults and knows nothing of this package's config reader, so the two can be compared.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from apertus_mlx.checkpoint.header import TensorInfo

Level = Literal["error", "warning"]

REQUIRED = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "rms_norm_eps", "vocab_size",
)  # fmt: skip
DEFAULT_THETA = 1_000_000.0
ROPE_TYPES = ("linear", "llama3")
FORMATS = {
    "affine": {(bits, group) for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)},
    "mxfp4": {(4, 32)},
    "mxfp8": {(8, 32)},
    "nvfp4": {(4, 16)},
}
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


@dataclass(frozen=True, slots=True)
class SwiftConfig:
    """What Swift computes with, after its defaults."""

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    vocab_size: int
    tied: bool
    rope_theta: float
    rope_scaling: Mapping[str, Any] | None

    @property
    def head_dim(self) -> int:
        """Always derived."""
        return self.hidden_size // self.heads


def decode(values: Mapping[str, Any]) -> tuple[SwiftConfig | None, list[Finding]]:
    """`config.json` as Swift decodes it; None where it throws."""
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
    if any(finding.level == "error" for finding in found):
        return None, found
    heads = int(values["num_attention_heads"])
    return SwiftConfig(
        int(values["hidden_size"]),
        int(values["intermediate_size"]),
        int(values["num_hidden_layers"]),
        heads,
        int(values.get("num_key_value_heads") or heads),
        int(values["vocab_size"]),
        values["tie_word_embeddings"],
        float(values.get("rope_theta", DEFAULT_THETA)),
        scaling,
    ), found


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
    config: SwiftConfig, block: Mapping[str, Any] | None, tensors: Mapping[str, TensorInfo]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every parameter of Swift's module map with its shape; quantized is what has scales."""
    hidden, inner, head = config.hidden_size, config.intermediate_size, config.head_dim
    linear = [("model.embed_tokens", config.vocab_size, hidden)]
    for index in range(config.layers):
        prefix = f"model.layers.{index}"
        queries, keys = config.heads * head, config.kv_heads * head
        linear += [
            (f"{prefix}.self_attn.q_proj", queries, hidden),
            (f"{prefix}.self_attn.k_proj", keys, hidden),
            (f"{prefix}.self_attn.v_proj", keys, hidden),
            (f"{prefix}.self_attn.o_proj", hidden, queries),
            (f"{prefix}.mlp.up_proj", inner, hidden),
            (f"{prefix}.mlp.down_proj", hidden, inner),
        ]
        yield f"{prefix}.attention_layernorm.weight", (hidden,)
        yield f"{prefix}.feedforward_layernorm.weight", (hidden,)
        yield f"{prefix}.self_attn.q_norm.weight", (head,)
        yield f"{prefix}.self_attn.k_norm.weight", (head,)
        yield f"{prefix}.mlp.act_fn.alpha_p", (1,)
        yield f"{prefix}.mlp.act_fn.alpha_n", (1,)
        yield f"{prefix}.mlp.act_fn.beta", ()
        yield f"{prefix}.mlp.act_fn.eps", ()
    yield "model.norm.weight", (hidden,)
    if not config.tied:
        linear.append(("lm_head", config.vocab_size, hidden))
    for path, rows, columns in linear:
        entry = block.get(path, block) if block is not None else None
        if f"{path}.scales" not in tensors or not isinstance(entry, dict):
            yield f"{path}.weight", (rows, columns)
            continue
        bits, group = int(entry["bits"]), int(entry["group_size"])
        yield f"{path}.weight", (rows, columns * bits // 32)
        yield f"{path}.scales", (rows, columns // group)
        if entry.get("mode", "affine") == "affine":
            yield f"{path}.biases", (rows, columns // group)


def check_tensors(
    config: SwiftConfig, block: Mapping[str, Any] | None, tensors: Mapping[str, TensorInfo]
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
            Finding("warning", wide[0], f"{len(wide)} tensors in float32 make MLX compute in it")
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


def _check_format(entry: Mapping[str, Any], where: str) -> list[Finding]:
    mode = entry.get("mode", "affine")
    if (entry.get("bits"), entry.get("group_size")) in FORMATS.get(str(mode), set()):
        return []
    text = f"mlx-swift has no {mode} of {entry.get('bits')} bits, groups {entry.get('group_size')}"
    return [Finding("error", where, text)]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
