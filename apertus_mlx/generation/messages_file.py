"""A conversation in a file: messages as OpenAI writes them, in JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from apertus_mlx.errors import NotFoundError, RejectedError
from apertus_mlx.system.model_files import exists, read_own_file
from apertus_mlx.system.strict_json import parse_json
from apertus_mlx.system.whole_file import whole_file

if TYPE_CHECKING:
    from apertus_mlx.text.template import Message

ROLES = ("system", "developer", "user", "assistant", "tool")


def read_messages(path: Path) -> list[Message]:
    """The messages in `path`: a list of them, or an object whose `messages` is one.

    Raises:
        NotFoundError: there is no such file.
        RejectedError: it is damaged, or holds something else.
    """
    if not exists(path):
        raise NotFoundError(f"{path}: there is no such file")
    value = parse_json(read_own_file(path), str(path))
    name = str(path)
    if isinstance(value, dict):
        name = f"{path}: messages"
        value = value.get("messages")
    if not isinstance(value, list):
        raise RejectedError(
            f"{path}: expected a list of messages, or an object whose 'messages' is one"
        )
    if not value:
        raise RejectedError(f"{path}: there is no message")
    for index, message in enumerate(value):
        _check(message, f"{name}[{index}]")
    return cast("list[Message]", value)


def write_messages(path: Path, messages: Sequence[Message]) -> None:
    """Write `messages` to `path`, whole or not at all, so that `read_messages` reads them.

    Raises:
        OSError: the file cannot be written.
    """
    text = json.dumps({"messages": messages}, ensure_ascii=False, indent=2)
    with whole_file(path) as new:
        # Half a surrogate pair, from input that was not UTF-8, exists in JSON's escapes alone.
        new.write_bytes(text.encode("utf-8", "backslashreplace") + b"\n")


def _check(message: Any, name: str) -> None:
    if not isinstance(message, Mapping):
        raise RejectedError(f"{name}: expected an object, found {type(message).__name__}")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise RejectedError(f"{name}: role {role!r:.40}: expected {', '.join(ROLES)}")
    if content is None and message.get("tool_calls"):
        return
    if not isinstance(content, str | list | Mapping):
        raise RejectedError(f"{name}: content: expected a text, found {type(content).__name__}")
