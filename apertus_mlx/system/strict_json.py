"""Strict reading of JSON files: unique keys, no NaN, bounded size; one object in a checkpoint's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from apertus_mlx.errors import RejectedError
from apertus_mlx.system.model_files import MAX_TEXT_BYTES, read_file, refuse_pointer


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in `path`, a file of a model folder.

    Raises:
        RejectedError: see `read_file`; or the file is empty, or not one JSON object in UTF-8 with
            unique keys. A byte order mark is accepted.
    """
    return parse_object(read_file(path, MAX_TEXT_BYTES), str(path))


def parse_object(data: bytes, name: str) -> dict[str, Any]:
    """Return the JSON object in `data`; `name` is what error messages call it."""
    value = parse_json(data, name)
    if not isinstance(value, dict):
        raise RejectedError(f"{name}: expected a JSON object, found {type(value).__name__}")
    return value


def parse_json(data: bytes, name: str) -> Any:
    """Return the JSON value in `data`, whatever it is; for the rest see `read_object`."""
    refuse_pointer(data, name)
    if not data.strip():
        raise RejectedError(f"{name}: is empty")
    try:
        return json.loads(
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


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"duplicate key {key[:60]!r}")
        result[key] = value
    return result


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")
