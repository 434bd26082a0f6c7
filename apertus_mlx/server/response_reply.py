"""What a client is told of a response: whole, or as events in OpenAI's order."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Mapping
from typing import Any

from apertus_mlx.server.errors import ApiError
from apertus_mlx.server.jobs import Ended, Event, Told
from apertus_mlx.server.output_items import OutputItem, call, message, reasoning
from apertus_mlx.server.response_store import ResponseStore
from apertus_mlx.server.responses import ResponseRequest, functions_of
from apertus_mlx.server.stream import StreamForm, named_event
from apertus_mlx.text.pieces import Piece

_FAILURES = {429: "rate_limit_exceeded"}
_ECHOED = ("instructions", "max_output_tokens", "previous_response_id", "temperature", "top_p")


class ResponseReply:
    """Tells one request's answer, and keeps it where the request wants that.

    A call comes in parts where it is sure to become one; else when it is certain, for what turned
    out to be none is text.
    """

    def __init__(self, model: str, asked: ResponseRequest, store: ResponseStore) -> None:
        self.id = f"resp_{secrets.token_hex(24)}"
        self._asked, self._store = asked, store
        self._number = 0
        self._output: list[dict[str, Any]] = []
        self._item: OutputItem | None = None
        self._calls: list[tuple[OutputItem, list[str]]] = []
        self._head = self._about(model, asked.fields)
        self.form = StreamForm(named_event, self._first, failed=self._failed)

    def whole(self, ended: Ended) -> dict[str, Any]:
        """The body of an answer that is no stream."""
        for _ in self._all_of(ended):
            pass
        return self._close(ended)

    def _first(self) -> Iterator[dict[str, Any]]:
        """The events before the answer."""
        for kind in ("created", "in_progress"):
            yield self._event(f"response.{kind}", response=self._response("in_progress"))

    def events(self, _: int, event: Event) -> Iterator[dict[str, Any]]:
        """What an event of the job becomes in a stream."""
        if isinstance(event, Told):
            yield from self._told(event.piece)
        elif isinstance(event, Ended):
            cut = event.answer.finish_reason == "length"
            yield from self._end_calls(cut)
            yield from self._end_item(cut)
            if not self._output:
                yield from self._write(message(), "")
                yield from self._end_item(cut)
            response = self._close(event)
            yield self._event(f"response.{response['status']}", response=response)

    def last(self) -> Iterator[dict[str, Any]]:
        """Nothing: the end of the answer has been told."""
        return iter(())

    def _failed(self, error: ApiError) -> dict[str, Any]:
        code = _FAILURES.get(error.status, "server_error")
        told = {"code": code, "message": error.message}
        return self._event("response.failed", response=self._response("failed", error=told))

    def _told(self, piece: Piece) -> Iterator[dict[str, Any]]:
        part = piece.call
        if part is None:
            if piece.text:
                yield from self._end_calls(False)
                yield from self._write(reasoning() if piece.is_thought else message(), piece.text)
        elif part.withdrawn:
            self._calls = self._calls[:-1]
        elif part.id is not None:
            yield from self._end_calls(False)
            begun = call(part.id, part.name or "")
            if self._asked.certain_calls:
                yield from self._end_item(False)
                yield from self._write(begun, "")
            else:
                self._calls = [(begun, [])]
        elif self._asked.certain_calls and self._item is not None:
            yield from self._write(self._item, part.arguments)
        elif self._calls:
            self._calls[-1][1].append(part.arguments)

    def _all_of(self, ended: Ended) -> Iterator[dict[str, Any]]:
        answer = ended.answer
        cut = answer.finish_reason == "length"
        if answer.thought:
            yield from self._write(reasoning(), answer.thought)
        if answer.text or not (answer.thought or answer.tool_calls):
            yield from self._write(message(), answer.text)
        for each in answer.tool_calls:
            yield from self._end_item(False)
            yield from self._write(call(each.id, each.name), each.arguments)
        yield from self._end_item(cut)

    def _end_calls(self, cut: bool) -> Iterator[dict[str, Any]]:
        """Tell the call that has become certain."""
        calls, self._calls = self._calls, []
        for item, parts in calls:
            yield from self._end_item(False)
            for text in parts or [""]:
                yield from self._write(item, text)
            yield from self._end_item(cut)

    def _write(self, into: OutputItem, text: str) -> Iterator[dict[str, Any]]:
        """Go on with an item of that type, or begin it."""
        if self._item is None or (self._item is not into and self._item.type != into.type):
            yield from self._end_item(False)
            self._item = into
            yield from self._of_item(into.begin())
        self._item.text += text
        if text:
            yield from self._of_item([self._item.delta(text)])

    def _end_item(self, cut: bool) -> Iterator[dict[str, Any]]:
        if self._item is not None:
            yield from self._of_item(self._item.end(cut))
            self._output.append(self._item.whole("incomplete" if cut else "completed"))
            self._item = None

    def _of_item(self, events: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for event in events:
            kind = event.pop("type")
            yield self._event(kind, output_index=len(self._output), **event)

    def _event(self, kind: str, **more: Any) -> dict[str, Any]:
        event = {"type": kind, "sequence_number": self._number, **more}
        self._number += 1
        return event

    def _close(self, ended: Ended) -> dict[str, Any]:
        """The response, which is kept if it is to be."""
        finish = ended.answer.finish_reason
        if finish == "length":
            why = {"reason": "max_output_tokens"}
            response = self._response("incomplete", ended, incomplete_details=why)
        else:
            response = self._response("completed", ended)
        if self._asked.keeps:
            self._store.keep(response, [*self._asked.items, *self._output])
        return response

    def _response(self, status: str, ended: Ended | None = None, **more: Any) -> dict[str, Any]:
        usage = None if ended is None else usage_of(ended)
        return {**self._head, "status": status, "output": list(self._output), "usage": usage} | more

    def _about(self, model: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        """What is told of every state of the response; what was not asked for is null."""
        effort = (fields.get("reasoning") or {}).get("effort")
        form = (fields.get("text") or {}).get("format")
        return {
            "id": self.id,
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            **{name: fields.get(name) for name in _ECHOED},
            "metadata": fields.get("metadata") or {},
            "model": model,
            "output": [],
            "parallel_tool_calls": fields.get("parallel_tool_calls", True),
            "reasoning": {"effort": effort, "summary": None},
            "store": self._asked.keeps,
            "text": {"format": form or {"type": "text"}},
            "tool_choice": fields.get("tool_choice", "auto"),
            "tools": [_function(each) for each in functions_of(fields.get("tools"))],
            "truncation": "disabled",
            "usage": None,
        }


def _function(tool: Mapping[str, Any]) -> dict[str, Any]:
    """A function as OpenAI tells of it."""
    told = {key: tool.get(key) for key in ("name", "description", "parameters", "strict")}
    return {"type": "function", **told}


def usage_of(ended: Ended) -> dict[str, Any]:
    """How many tokens there were."""
    prompt, made = ended.answer.prompt_tokens, ended.answer.generated_tokens
    cached = ended.cached_tokens
    # All else of the prompt has been written to the answer's cache.
    details = {"cached_tokens": cached, "cache_write_tokens": prompt - cached}
    return {
        "input_tokens": prompt,
        "input_tokens_details": details,
        "output_tokens": made,
        "output_tokens_details": {"reasoning_tokens": ended.reasoning_tokens},
        "total_tokens": prompt + made,
    }
