"""What a request is made of, in files of JSON as OpenAI writes it: messages, and tools."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from apertus_mlx.errors import NotFoundError, RejectedError, UsageError
from apertus_mlx.system.model_files import exists, read_own_file
from apertus_mlx.system.strict_json import parse_json
from apertus_mlx.system.whole_file import whole_file
from apertus_mlx.text import messages as text_messages
from apertus_mlx.text import tool_definitions

if TYPE_CHECKING:
    from apertus_mlx.text.template import Message


def read_messages(path: Path) -> list[Message]:
    """The messages in `path`: a list of them, or an object whose `messages` is one.

    Raises:
        NotFoundError: there is no such file.
        RejectedError: it is damaged, or no conversation; see `text.messages.read_messages`.
    """
    return parse_messages(_read(path), str(path))


def parse_messages(data: bytes, name: str) -> list[Message]:
    """The messages in JSON, as `read_messages` takes them; `name` is what errors call it."""
    found = _items(data, name, "messages", text_messages.read_messages)
    return cast("list[Message]", found)


def read_tools(path: Path) -> list[dict[str, Any]]:
    """The tools in `path`: a list of definitions, or an object whose `tools` is one.

    Raises:
        NotFoundError: there is no such file.
        RejectedError: it is damaged, or a tool is none; see `text.tool_definitions.read_tools`.
    """
    return _items(_read(path), str(path), "tools", tool_definitions.read_tools)


def write_messages(path: Path, messages: Sequence[Message]) -> None:
    """Write `messages` to `path`, whole or not at all, so that `read_messages` reads them.

    Raises:
        OSError: the file cannot be written.
    """
    text = json.dumps({"messages": messages}, ensure_ascii=False, indent=2)
    with whole_file(path) as new:
        # Half a surrogate pair, from input that was not UTF-8, exists in JSON's escapes alone.
        new.write_bytes(text.encode("utf-8", "backslashreplace") + b"\n")


def _read(path: Path) -> bytes:
    if not exists(path):
        raise NotFoundError(f"{path}: there is no such file")
    return read_own_file(path)


def _items(
    data: bytes, name: str, key: str, check: Callable[[object, str], object]
) -> list[dict[str, Any]]:
    """The list in `data`, or under `key` of an object there, once `check` has read it."""
    value = parse_json(data, name)
    place = name
    if isinstance(value, dict):
        place = f"{name}: {key}"
        value = value.get(key)
    if not isinstance(value, list):
        raise RejectedError(f"{name}: expected a list of {key}, or an object whose '{key}' is one")
    if not value:
        raise RejectedError(f"{name}: there is no {key.removesuffix('s')}")
    try:
        check(value, place)
    except UsageError as error:
        raise RejectedError(str(error)) from None
    return value
