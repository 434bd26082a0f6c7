"""The items that a response's output is made of, and the events of each in a stream."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import Any

Events = list[dict[str, Any]]


@dataclass(slots=True, eq=False)
class OutputItem:
    """An item that grows.

    Attributes:
        type: on the wire.
        id: of the item.
        about: its keys beside type, id, status and text.
        part: the type of the one part that holds its text; None for a call's arguments.
        deltas: what events of its text begin with.
        text: so far.
    """

    type: str
    id: str
    about: dict[str, Any]
    part: str | None
    deltas: str
    text: str = field(default="")

    def whole(self, status: str) -> dict[str, Any]:
        """The item as it is now."""
        found = {"id": self.id, "type": self.type, "status": status, **self.about}
        if self.part is None:
            return {**found, "arguments": self.text}
        return {**found, "content": [self._part(self.text)]}

    def begin(self) -> Events:
        """The events before its text."""
        # The text comes in deltas; an item that begins has none.
        empty = {**self.whole("in_progress"), ("arguments" if self.part is None else "content"):
                 "" if self.part is None else []}  # fmt: skip
        events: Events = [{"type": "response.output_item.added", "item": empty}]
        if self.part is not None:
            part = self._part("")
            events.append({"type": "response.content_part.added", **self._place(), "part": part})
        return events

    def delta(self, text: str) -> dict[str, Any]:
        """The event of more text."""
        return {"type": f"{self.deltas}.delta", **self._place(), "delta": text, **self._logprobs()}

    def end(self, cut: bool) -> Events:
        """The events after its text; `cut`: there would have been more."""
        key = "arguments" if self.part is None else "text"
        done = {"type": f"{self.deltas}.done", **self._place(), key: self.text, **self._logprobs()}
        if self.part is None:
            done["name"] = self.about["name"]
        events = [done]
        if self.part is not None:
            part = self._part(self.text)
            events.append({"type": "response.content_part.done", **self._place(), "part": part})
        item = self.whole("incomplete" if cut else "completed")
        return [*events, {"type": "response.output_item.done", "item": item}]

    def _part(self, text: str) -> dict[str, Any]:
        more: dict[str, Any] = (
            {"annotations": [], "logprobs": []} if self.part == "output_text" else {}
        )
        return {"type": self.part, "text": text, **more}

    def _place(self) -> dict[str, Any]:
        return {"item_id": self.id} | ({} if self.part is None else {"content_index": 0})

    def _logprobs(self) -> dict[str, Any]:
        return {"logprobs": []} if self.part == "output_text" else {}


def message() -> OutputItem:
    """The answer's text."""
    about = {"role": "assistant"}
    return OutputItem("message", _id("msg"), about, "output_text", "response.output_text")


def reasoning() -> OutputItem:
    """Thoughts."""
    about: dict[str, Any] = {"summary": [], "encrypted_content": None}
    return OutputItem("reasoning", _id("rs"), about, "reasoning_text", "response.reasoning_text")


def call(call_id: str, name: str) -> OutputItem:
    """A call of a function."""
    about = {"call_id": call_id, "name": name}
    events = "response.function_call_arguments"
    return OutputItem("function_call", _id("fc"), about, None, events)


def _id(kind: str) -> str:
    return f"{kind}_{secrets.token_hex(24)}"
