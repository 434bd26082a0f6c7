"""Whether an app can run a folder: with ApertusKit, and with mlx-swift-lm as it is released."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from apertus_mlx.checkpoint.config import ModelConfig
from apertus_mlx.convert.check.swift_contract import Finding
from apertus_mlx.convert.write.template_version import UNKNOWN, template_version
from apertus_mlx.system.model_files import exists
from apertus_mlx.system.strict_json import parse_object
from apertus_mlx.text.tokenizer_file import read_tokenizer_file

KIT, STOCK, FACTORS = "ApertusKit", "mlx-swift-lm", "factors"
# How every Apertus tokenizer cuts texts; ApertusKit does so by code.
PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_STEPS: list[dict[str, Any]] = [
    {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False},
    {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
]
# What others than mlx-swift-lm compute with.
_SIZES_OF_OTHERS = ("config.json: head_dim", "config.json: output_vocab_size", FACTORS)


def check_kit(directory: Path, config: ModelConfig) -> Iterator[Finding]:
    """Why ApertusKit cannot run the folder, whose config and tensors are in order.

    Raises:
        RejectedError: the tokenizer's file is damaged.
    """
    path = directory / "tokenizer.json"
    if not exists(path):
        yield Finding("warning", KIT, "cannot run this folder: it has no tokenizer.json")
        return
    if not _cuts_as_apertus(parse_object(read_tokenizer_file(path), str(path))):
        text = "cannot run this folder: tokenizer.json cuts texts otherwise than those of Apertus"
        yield Finding("warning", KIT, text)
    if template_version(directory, config) == UNKNOWN:
        text = "cannot chat with this folder: its template writes prompts of no form of v1 or v1.1"
        yield Finding("warning", KIT, text)


def check_stock(findings: Sequence[Finding]) -> Iterator[Finding]:
    """Whether one of the findings about Swift's contract keeps mlx-swift-lm from the folder."""
    for finding in findings:
        if finding.level == "error" or finding.where in _SIZES_OF_OTHERS:
            text = f"cannot run this folder: {finding.where}: {finding.text}"
            yield Finding("warning", STOCK, text)
            return


def _cuts_as_apertus(tokenizer: Mapping[str, Any]) -> bool:
    part = tokenizer.get("pre_tokenizer")
    if tokenizer.get("normalizer") is not None or not isinstance(part, dict):
        return False
    steps = part.get("pretokenizers")
    if part.get("type") != "Sequence" or not isinstance(steps, list) or len(steps) != len(_STEPS):
        return False
    return all(
        isinstance(step, dict) and {key: step.get(key) for key in wanted} == wanted
        for step, wanted in zip(steps, _STEPS, strict=True)
    )
