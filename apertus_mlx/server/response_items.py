"""The items of a response's input, as the messages of a chat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from apertus_mlx.server.errors import wrong
from apertus_mlx.server.fields import MOST_MESSAGES, kind_of, shown, unsupported

Item = Mapping[str, Any]
ROLES = ("user", "assistant", "system", "developer")
MESSAGE_PARTS = ("input_text", "output_text", "text", "refusal")
ITEM_TYPES = ("message", "function_call", "function_call_output", "reasoning")


class Conversation:
    """Messages of a chat that are made of items.

    Items of an assistant that follow one another are one message, as a chat has it.

    Attributes:
        messages: as a chat's body has them.
        places: what of the request each message began with.
    """

    def __init__(self, instructions: str | None = None) -> None:
        self.messages: list[dict[str, Any]] = []
        self.places: list[str] = []
        if instructions:
            self._add("instructions", {"role": "system", "content": instructions})

    def add(self, items: Sequence[Any], name: str) -> None:
        """Add items, which error messages call `name`.

        Raises:
            ApiError: 400, one is wrong or not supported.
        """
        if len(items) > MOST_MESSAGES:
            raise wrong(name, f"there are {len(items)} items; at most {MOST_MESSAGES}")
        for index, item in enumerate(items):
            place = f"{name}[{index}]"
            if not isinstance(item, dict):
                raise wrong(place, f"expected an object, not {kind_of(item)}")
            kind = item.get("type")
            if kind is None and "role" in item:
                kind = "message"
            if kind not in ITEM_TYPES:
                raise wrong(
                    f"{place}.type", f"{shown(kind)} is not supported", "unsupported_parameter"
                )
            getattr(self, f"_{kind}")(place, item)

    def _message(self, place: str, item: Item) -> None:
        role = item.get("role")
        if role not in ROLES:
            raise wrong(f"{place}.role", f"{shown(role)}: expected {', '.join(ROLES)}")
        text = _text(f"{place}.content", item.get("content"), MESSAGE_PARTS)
        if role != "assistant":
            self._add(place, {"role": role, "content": text})
            return
        self._turn(place, "content", "tool_calls")["content"] = text

    def _reasoning(self, place: str, item: Item) -> None:
        parts = item.get("content") or []
        text = _text(f"{place}.content", parts, ("reasoning_text",)) if parts else ""
        text = text or _text(f"{place}.summary", item.get("summary") or [], ("summary_text",))
        if not text and item.get("encrypted_content"):
            raise unsupported(f"{place}.encrypted_content", "it is of another server")
        if text:
            self._turn(place, "reasoning_content", "content", "tool_calls")["reasoning_content"] = (
                text
            )

    def _function_call(self, place: str, item: Item) -> None:
        function = {key: _string(place, item, key) for key in ("name", "arguments")}
        call = {"id": _string(place, item, "call_id"), "type": "function", "function": function}
        self._turn(place).setdefault("tool_calls", []).append(call)

    def _function_call_output(self, place: str, item: Item) -> None:
        text = _text(f"{place}.output", item.get("output"), ("input_text", "output_text", "text"))
        call = _string(place, item, "call_id")
        self._add(place, {"role": "tool", "tool_call_id": call, "content": text})

    def _turn(self, place: str, *before: str) -> dict[str, Any]:
        """The assistant's message that goes on; a new one if it has one of `before` already."""
        last = self.messages[-1] if self.messages else {"role": "user"}
        if last["role"] != "assistant" or any(last.get(key) for key in before):
            last = {"role": "assistant", "content": None}
            self._add(place, last)
        return last

    def _add(self, place: str, message: dict[str, Any]) -> None:
        self.messages.append(message)
        self.places.append(place)


def _string(place: str, item: Item, key: str) -> str:
    value = item.get(key)
    if not isinstance(value, str):
        raise wrong(f"{place}.{key}", f"expected a text, not {kind_of(value)}")
    return value


def _text(place: str, content: Any, kinds: Sequence[str]) -> str:
    """A text, or the texts of its parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise wrong(place, f"expected a text or a list of parts, not {kind_of(content)}")
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in kinds:
            words = f"{shown(kind)} is not supported; expected {', '.join(kinds)}"
            raise wrong(f"{place}[{index}].type", words, "unsupported_parameter")
        key = "refusal" if kind == "refusal" else "text"
        texts.append(_string(f"{place}[{index}]", part, key))
    return "".join(texts)
