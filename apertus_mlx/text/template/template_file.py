"""Finds the chat template among the files of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from apertus_mlx.errors import RejectedError
from apertus_mlx.system.model_files import exists, read_file
from apertus_mlx.system.strict_json import read_object

CONFIG = "tokenizer_config.json"
MAX_TEMPLATE_BYTES = 2**18


def read_source(directory: Path) -> tuple[str | None, Path]:
    """Return the template's Jinja text, and the file that holds it.

    `chat_template.jinja` wins over `chat_template.json`, and that over the `chat_template` of
    `tokenizer_config.json`: one text, or a list of named ones, of which `default` counts. The
    text is None for a checkpoint without one, as base models are.

    Raises:
        RejectedError: a file is damaged.
    """
    path = directory / "chat_template.jinja"
    if exists(path):
        try:
            return read_file(path, MAX_TEMPLATE_BYTES).decode("utf-8-sig"), path
        except UnicodeDecodeError:
            raise RejectedError(f"{path}: is not UTF-8 text") from None
    path = directory / "chat_template.json"
    if not exists(path):
        path = directory / CONFIG
    value = read_object(path).get("chat_template") if exists(path) else None
    if isinstance(value, list):
        named = [each for each in value if isinstance(each, dict) and each.get("name") == "default"]
        if not named:
            raise RejectedError(f"{path}: chat_template has no template named 'default'")
        value = named[-1].get("template")
    if not isinstance(value, str | None):
        raise RejectedError(f"{path}: chat_template must be a text or a list of named texts")
    return value, path


def read_token_texts(directory: Path) -> dict[str, str]:
    """Return the `*_token` variables that templates may use, from `tokenizer_config.json`.

    Raises:
        RejectedError: the file is damaged.
    """
    path = directory / CONFIG
    config = read_object(path) if exists(path) else {}
    texts: dict[str, str] = {}
    for key in ("bos_token", "eos_token", "pad_token", "unk_token"):
        value = config.get(key)
        value = value.get("content") if isinstance(value, Mapping) else value
        if isinstance(value, str):
            texts[key] = value
        elif value is not None:
            raise RejectedError(f"{path}: {key} must be a text")
    return texts
