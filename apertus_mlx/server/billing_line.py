"""Claude Code's billing line, which changes with each request, is no part of a prompt.

It stands first in its system text. With it no two prompts would begin alike.
"""

from __future__ import annotations

from typing import Any

PREFIX = "x-anthropic-billing-header:"


def without_billing_line(messages: Any) -> Any:
    """The messages, whose system texts begin behind that line; anything else stays as it is."""
    if not isinstance(messages, list):
        return messages
    return [_without(each) if _is_system(each) else each for each in messages]


def _is_system(message: Any) -> bool:
    return isinstance(message, dict) and message.get("role") in ("system", "developer")


def _without(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": _behind(content)}
    if not isinstance(content, list) or not content or not isinstance(content[0], dict):
        return message
    first = content[0]
    text = first.get("text")
    if not isinstance(text, str) or not text.startswith(PREFIX):
        return message
    rest = _behind(text)
    return {**message, "content": [*([{**first, "text": rest}] if rest else []), *content[1:]]}


def _behind(text: str) -> str:
    return text.partition("\n")[2].lstrip("\n") if text.startswith(PREFIX) else text
