"""Checks an output folder: against its manifest, as this package reads it, and as an app would."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from apertus_mlx.checkpoint.config import CONFIG_FILE, ModelConfig, read_config
from apertus_mlx.checkpoint.inventory import take_inventory
from apertus_mlx.checkpoint.tensors import INDEX_FILE, open_checkpoint
from apertus_mlx.convert.check import swift_contract as swift
from apertus_mlx.convert.check.app_support import FACTORS, KIT, check_kit, check_stock
from apertus_mlx.convert.check.swift_contract import Finding
from apertus_mlx.convert.plan.shards import MAX_SHARD_BYTES
from apertus_mlx.convert.write.golden import GOLDEN, differing
from apertus_mlx.convert.write.manifest import MANIFEST, read_manifest, sha256
from apertus_mlx.errors import NotFoundError, RejectedError
from apertus_mlx.system.model_files import checked, exists, read_file
from apertus_mlx.system.progress import OnProgress
from apertus_mlx.system.strict_json import read_object

MAX_TEMPLATE_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class Verification:
    """What was found; no errors means that the folder is what it claims to be."""

    directory: Path
    files: int
    findings: tuple[Finding, ...]

    @property
    def errors(self) -> tuple[Finding, ...]:
        """What makes the folder unusable or untrue."""
        return tuple(finding for finding in self.findings if finding.level == "error")

    def as_json(self) -> dict[str, Any]:
        """What `verify --json` prints."""
        return {
            "directory": str(self.directory),
            "ok": not self.errors,
            "files": self.files,
            "findings": [asdict(finding) for finding in self.findings],
        }


def verify(
    directory: Path, golden: bool = False, progress: OnProgress | None = None
) -> Verification:
    """Check the folder `directory` and everything in it.

    With `golden` also compute how the weights answer the golden prompts, if nothing is wrong
    so far, and compare that with what the folder says, or write it there where it says nothing.

    Raises:
        NotFoundError: there is no such folder.
        ResourceError: the weights do not fit this machine's memory in float32.
    """
    if not directory.is_dir():
        what = "is a file; give its folder" if directory.exists() else "no such folder"
        raise NotFoundError(f"{directory}: {what}")
    findings = list(_check_manifest(directory))
    findings += _check_model(directory)
    if golden and not any(finding.level == "error" for finding in findings):
        findings += _check_answers(directory, progress)
    return Verification(directory, sum(1 for _ in directory.iterdir()), tuple(findings))


def _check_manifest(directory: Path) -> Iterator[Finding]:
    try:
        files = read_manifest(directory)
    except RejectedError as error:
        yield Finding("error", MANIFEST, str(error))
        return
    for name, record in files.items():
        path = directory / name
        if not exists(path):
            yield Finding("error", name, "is missing")
            continue
        try:
            size_bytes = checked(path).stat().st_size
        except RejectedError as error:
            yield Finding("error", name, str(error))
            continue
        if size_bytes != record.size_bytes:
            text = f"has {size_bytes} bytes, the manifest says {record.size_bytes}"
            yield Finding("error", name, text)
        elif sha256(path) != record.sha256:
            yield Finding("error", name, "was changed: its hash is not the manifest's")
        elif name.endswith(".safetensors") and record.size_bytes > MAX_SHARD_BYTES + 2**24:
            yield Finding("warning", name, "is larger than a 32-bit process can map")
    for path in sorted(directory.rglob("*")):
        name = str(path.relative_to(directory))
        if (path.is_dir() and not path.is_symlink()) or name in files or name == MANIFEST:
            continue
        # Released Swift versions load every safetensors file below the folder.
        level: swift.Level = "error" if name.endswith(".safetensors") else "warning"
        yield Finding(level, name, "is not in the manifest")


def _check_model(directory: Path) -> list[Finding]:
    try:
        config = read_config(directory)
        checkpoint = open_checkpoint(directory)
        values = read_object(directory / CONFIG_FILE)
        factors = [tensor.name for tensor in take_inventory(directory).factors.values()]
        findings: list[Finding] = []
        for prompt in differing(directory, config):
            findings.append(Finding("error", GOLDEN, f"{prompt!r} has other token ids today"))
        if not exists(directory / INDEX_FILE):
            findings.append(Finding("warning", INDEX_FILE, "absent"))
    except RejectedError as error:
        return [Finding("error", "weights", str(error))]
    tensors = {key: t for key, t in checkpoint.tensors.items() if key not in factors}
    contract = _check_swift(config, values, tensors)
    if factors:
        text = (
            f"{len(factors)} beside the codes, first {factors[0]}: only apertus-mlx and ApertusKit"
        )
        contract.insert(0, Finding("warning", FACTORS, f"{text} have a place for them"))
    findings += [*contract, *check_stock(contract)]
    findings += _check_tokenizer(directory)
    try:
        return [*findings, *check_kit(directory, config)]
    except RejectedError as error:
        return [*findings, Finding("warning", KIT, f"cannot run this folder: {error}")]


def _check_answers(directory: Path, progress: OnProgress | None) -> list[Finding]:
    # Brings the model with it, which no other check needs.
    from apertus_mlx.convert.write.golden_answers import (
        GOLDEN_ANSWERS,
        differing_answers,
        write_golden_answers,
    )

    if not exists(directory / GOLDEN_ANSWERS):
        write_golden_answers(directory, progress)
        return []
    text = "is answered otherwise on this machine: its arithmetic, or the file, is wrong"
    try:
        names = differing_answers(directory, progress)
    except RejectedError as error:
        return [Finding("error", GOLDEN_ANSWERS, str(error))]
    return [Finding("error", GOLDEN_ANSWERS, f"{name[:60]!r} {text}") for name in names]


def _check_swift(
    config: ModelConfig, values: Mapping[str, Any], tensors: Mapping[str, Any]
) -> list[Finding]:
    findings = swift.check_config(values)
    block, more = swift.check_quantization(values)
    findings += more
    if any(finding.level == "error" for finding in findings):
        return findings
    meaning = swift.check_meaning(config, values)
    if any(finding.level == "warning" for finding in meaning):
        return meaning
    return meaning + swift.check_tensors(config, block, tensors)


def _check_tokenizer(directory: Path) -> list[Finding]:
    if not exists(directory / "tokenizer.json"):
        return [Finding("warning", "tokenizer.json", "absent: text cannot be read or written")]
    path = directory / "tokenizer_config.json"
    if not exists(path):
        return [Finding("warning", path.name, "absent: swift-transformers needs it")]
    template = directory / "chat_template.jinja"
    text = None
    try:
        if exists(template):
            text = read_file(template, MAX_TEMPLATE_BYTES).decode("utf-8", "replace")
        return swift.check_tokenizer(read_object(path), text)
    except RejectedError as error:
        return [Finding("error", "tokenizer", str(error))]
