"""`apertus_mlx_manifest.json`: what a folder is, where it came from, what each file hashes to.

Format version 1. `quality` is room for a quality measurement, null until there is
one. The manifest itself is not in its list of files.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from apertus_mlx import __version__
from apertus_mlx.checkpoint.config_keys import KeyReader
from apertus_mlx.errors import RejectedError
from apertus_mlx.system.model_files import exists, is_plain_name, open_file
from apertus_mlx.system.strict_json import read_object
from apertus_mlx.system.whole_file import whole_file

MANIFEST = "apertus_mlx_manifest.json"
FORMAT_VERSION = 1
HASH_BLOCK_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class FileRecord:
    """What a file must be."""

    size_bytes: int
    sha256: str


def make_manifest(
    directory: Path,
    source: Mapping[str, Any],
    figures: Mapping[str, Any],
    quality: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Describe every file in `directory`; `figures` are copied in as they are."""
    files = {
        path.name: _record(path)
        for path in sorted(directory.iterdir())
        if path.name != MANIFEST and not path.name.startswith(".")
    }
    return {
        "format_version": FORMAT_VERSION,
        "source": dict(source),
        "made_with": {
            "apertus-mlx": __version__,
            "mlx": _version("mlx"),
            "safetensors": _version("safetensors"),
            "python": platform.python_version(),
        },
        **figures,
        "files": files,
        "quality": quality,
    }


def add_file(directory: Path, path: Path) -> None:
    """Enter a file of the finished folder `directory` into its manifest.

    Raises:
        RejectedError: the manifest is missing or damaged.
    """
    read_manifest(directory)
    manifest = dict(read_object(directory / MANIFEST))
    manifest["files"] = dict(sorted({**manifest["files"], path.name: _record(path)}.items()))
    with whole_file(directory / MANIFEST) as file:
        write_json(file, manifest)


def _record(path: Path) -> dict[str, Any]:
    return {"size_bytes": path.stat().st_size, "sha256": sha256(path)}


def read_manifest(directory: Path) -> dict[str, FileRecord]:
    """The files that the manifest in `directory` names, and what each must be.

    Raises:
        RejectedError: it is missing, damaged, or of a version that this package does not know.
    """
    path = directory / MANIFEST
    if not exists(path):
        raise RejectedError(f"{directory}: no {MANIFEST}; only folders made by convert have one")
    keys = KeyReader(read_object(path), str(path))
    version = keys.integer("format_version", 1, 2**31)
    if version != FORMAT_VERSION:
        raise RejectedError(
            f"{path}: format_version {version}; this package knows {FORMAT_VERSION}"
        )
    files = {}
    for name, entry in (keys.mapping("files") or {}).items():
        if not is_plain_name(name) or not isinstance(entry, dict):
            raise RejectedError(f"{path}: files: {name[:80]!r} is not a plain file name with facts")
        record = KeyReader(entry, f"{path}: files: {name}")
        digest = record.text("sha256")
        if len(digest) != 64 or set(digest) - set("0123456789abcdef"):
            raise RejectedError(f"{path}: files: {name}: sha256 is not 64 hexadecimal digits")
        files[name] = FileRecord(record.integer("size_bytes", 0, 2**60), digest)
    if not files:
        raise RejectedError(f"{path}: files: names no files")
    keys.mapping("source")
    keys.number("bits_per_weight", 0.0, 1e6)
    return files


def sha256(path: Path) -> str:
    """The hash of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open_file(path) as file:
        while block := file.read(HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write an object as a person can read it."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
