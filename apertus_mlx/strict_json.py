"""Strict reading of a checkpoint's JSON files: one object, unique keys, no NaN, bounded size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from apertus_mlx.errors import RejectedError

MAX_JSON_BYTES = 64 * 2**20
LFS_POINTER_PREFIX = b"version https://git-lfs"


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in `path`.

    Raises:
        RejectedError: the file is missing, empty, too large, a Git LFS pointer, or not one
            JSON object in UTF-8 with unique keys. A byte order mark is accepted.
    """
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise RejectedError(
                f"{path}: {size} bytes is too large for a JSON file of a checkpoint"
            )
        data = path.read_bytes()
    except OSError as error:
        raise RejectedError(f"{path}: cannot be read ({error.strerror})") from None
    return parse_object(data, str(path))


def parse_object(data: bytes, name: str) -> dict[str, Any]:
    """Return the JSON object in `data`; `name` is what error messages call it."""
    if data.startswith(LFS_POINTER_PREFIX):
        raise RejectedError(f"{name}: is a Git LFS pointer, not the file; run `git lfs pull`")
    if not data.strip():
        raise RejectedError(f"{name}: is empty")
    try:
        value = json.loads(
            data.decode("utf-8-sig"),
            object_pairs_hook=_unique_keys,
            parse_constant=_refuse_constant,
        )
    except UnicodeDecodeError:
        raise RejectedError(f"{name}: is not UTF-8 text") from None
    except RecursionError:
        raise RejectedError(f"{name}: is nested too deeply") from None
    except ValueError as error:
        raise RejectedError(f"{name}: is not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise RejectedError(f"{name}: expected a JSON object, found {type(value).__name__}")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"duplicate key {key[:60]!r}")
        result[key] = value
    return result


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")
