"""What a client of `/v1/messages` is told of an answer, whole or as a stream."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from apertus_mlx.errors import RejectedError
from apertus_mlx.server.errors import ApiError
from apertus_mlx.server.jobs import Ended, Event, Job, Told
from apertus_mlx.server.message_errors import message_error, new_request_id
from apertus_mlx.server.messages import MessageRequest
from apertus_mlx.server.stream import PING, StreamForm, named_event
from apertus_mlx.text.json_ends import require_object
from apertus_mlx.text.pieces import CallPiece, Piece, ToolCall

# Clients leave out a block of thoughts without a signature; this one vouches for nothing.
SIGNATURE = "unsigned"
Chunk = dict[str, Any]


@dataclass(slots=True)
class MessageReply:
    """What a client is told of one request's answer.

    A call comes in parts where it is sure to become one; else when it is whole, for what a
    client has read cannot be withdrawn.
    """

    model: str
    asked: MessageRequest
    job: Job
    id: str = field(default_factory=lambda: f"msg_{secrets.token_hex(12)}")
    request_id: str = field(default_factory=new_request_id)
    _begun: bool = False
    _index: int = -1
    _open: str | None = None  # what the block that is being told is of
    _call: int = -1

    @property
    def form(self) -> StreamForm:
        """Of the stream."""
        return StreamForm(named_event, ping=self._ping, failed=self.failed)

    def whole(self, ended: Ended) -> dict[str, Any]:
        """The body of an answer that is no stream."""
        answer = ended.answer
        content: list[dict[str, Any]] = []
        if answer.thought:
            thought = answer.thought if self.asked.thoughts else ""
            content.append({"type": "thinking", "thinking": thought, "signature": SIGNATURE})
        if answer.text:
            content.append({"type": "text", "text": answer.text})
        content += [_tool_use(call.id, call.name, found) for call, found in _calls(ended)]
        usage = self._usage(ended.cached_tokens, answer.generated_tokens)
        return {**self._head(content, usage), **_stop(ended)}

    def events(self, _: int, event: Event) -> Iterator[Chunk]:
        """What an event becomes in a stream."""
        if not isinstance(event, Told | Ended):
            return
        if not self._begun:
            self._begun = True
            message = {**self._head([], self._usage(self.job.cached, 0)), **_NOT_STOPPED}
            yield {"type": "message_start", "message": message}
        if isinstance(event, Told):
            yield from self._piece(event.piece)
            return
        if not self.asked.certain_calls:
            for call, found in _calls(event):
                yield from self._start("call", _tool_use(call.id, call.name, {}))
                yield self._delta("input_json_delta", "partial_json", json.dumps(found))
        yield from self._stop()
        usage = self._usage(event.cached_tokens, event.answer.generated_tokens)
        yield {"type": "message_delta", "delta": _stop(event), "usage": usage}
        yield {"type": "message_stop"}

    def last(self) -> Iterator[Chunk]:
        """What follows the answer in a stream."""
        yield from ()

    def failed(self, error: ApiError) -> Chunk:
        """The event of an error."""
        return message_error(error, self.request_id)

    def _ping(self) -> bytes:
        # Before the first event a comment: clients take a message's start for the first.
        return named_event({"type": "ping"}) if self._begun else PING

    def _head(self, content: list[Any], usage: dict[str, Any]) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": content,
            "usage": usage,
        }

    def _usage(self, cached: int, made: int) -> dict[str, Any]:
        return {
            "input_tokens": len(self.job.task.prompt) - cached,
            "cache_read_input_tokens": cached,
            "cache_creation_input_tokens": 0,
            "output_tokens": made,
        }

    def _piece(self, piece: Piece) -> Iterator[Chunk]:
        if piece.call is not None:
            yield from self._call_piece(piece.call)
        elif piece.is_thought:
            if self._open != "thinking":
                block = {"type": "thinking", "thinking": "", "signature": ""}
                yield from self._start("thinking", block)
            if self.asked.thoughts:
                yield self._delta("thinking_delta", "thinking", piece.text)
        else:
            if self._open != "text":
                yield from self._start("text", {"type": "text", "text": ""})
            yield self._delta("text_delta", "text", piece.text)

    def _call_piece(self, call: CallPiece) -> Iterator[Chunk]:
        if not self.asked.certain_calls:
            return
        if call.id is not None:
            yield from self._start("call", _tool_use(call.id, call.name or "", {}))
        if call.arguments:
            yield self._delta("input_json_delta", "partial_json", call.arguments)

    def _start(self, kind: str, block: dict[str, Any]) -> Iterator[Chunk]:
        yield from self._stop()
        self._open = kind
        self._index += 1
        yield {"type": "content_block_start", "index": self._index, "content_block": block}
        if self._index == 0:
            yield {"type": "ping"}

    def _stop(self) -> Iterator[Chunk]:
        if self._open == "thinking":
            yield self._delta("signature_delta", "signature", SIGNATURE)
        if self._open is not None:
            yield {"type": "content_block_stop", "index": self._index}
        self._open = None

    def _delta(self, kind: str, name: str, text: str) -> Chunk:
        delta = {"type": kind, name: text}
        return {"type": "content_block_delta", "index": self._index, "delta": delta}


_NOT_STOPPED = {"stop_reason": None, "stop_sequence": None}
_REASONS = {"tool_calls": "tool_use", "length": "max_tokens"}


def _stop(ended: Ended) -> dict[str, Any]:
    answer = ended.answer
    if answer.stop_string is not None and answer.finish_reason != "tool_calls":
        return {"stop_reason": "stop_sequence", "stop_sequence": answer.stop_string}
    return {**_NOT_STOPPED, "stop_reason": _REASONS.get(answer.finish_reason, "end_turn")}


def _calls(ended: Ended) -> Iterator[tuple[ToolCall, dict[str, Any]]]:
    """The calls with their arguments; one that is cut has none, and is left out."""
    for call in ended.answer.tool_calls:
        try:
            require_object(call.arguments)
            found = json.loads(call.arguments)
            json.dumps(found, allow_nan=False)
        except (RejectedError, ValueError):
            if ended.answer.finish_reason != "tool_calls":
                continue
            found = {}  # an output filter has broken them
        yield call, found


def _tool_use(call_id: str, name: str, found: dict[str, Any]) -> dict[str, Any]:
    call_id = f"toolu_{call_id.removeprefix('call_')}"
    return {"type": "tool_use", "id": call_id, "name": name, "input": found}
