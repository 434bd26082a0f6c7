"""POST /v1/chat/completions: one request, its answers, whole or as a stream."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from apertus_mlx.errors import ApertusError
from apertus_mlx.server.billing_line import without_billing_line
from apertus_mlx.server.errors import in_request, wrong
from apertus_mlx.server.fields import (
    kind_of,
    read_cache_key,
    read_fields,
    read_object,
    shown,
    unsupported,
)
from apertus_mlx.server.jobs import Ended, Event, Task, Told
from apertus_mlx.server.sampling_fields import read_sampling, read_stream_options
from apertus_mlx.server.served_model import ServedModel
from apertus_mlx.server.token_watch import TokenLogprob
from apertus_mlx.server.tool_fields import read_response_format, read_tool_fields
from apertus_mlx.text.pieces import CallPiece

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A checked request.

    Attributes:
        task: what is to be computed.
        streams: whether the answer is a stream.
        usage: whether the stream ends with usage.
    """

    task: Task
    streams: bool
    usage: bool


def read_chat_prompt(body: Mapping[str, Any], model: ServedModel) -> list[int]:
    """The token ids of the prompt of a body, which is checked as far as they need."""
    return _read(body, model)[0]


def read_chat(body: Mapping[str, Any], model: ServedModel) -> ChatRequest:
    """Check a body; may take seconds.

    Raises:
        ApiError: 400, something in it is wrong; 404, another model.
    """
    prompt, fields, tools, think = _read(body, model)
    schema = read_response_format(fields.get("response_format"))
    if schema is not None or (tools.grammar is not None and tools.grammar.grammar is not None):
        model.warm_grammars()
    top = fields.get("top_logprobs")
    if top is not None and not fields.get("logprobs"):
        raise wrong("top_logprobs", "needs logprobs")
    logprobs = (top or 0) if fields.get("logprobs") else None
    if logprobs is not None and model.filtered:
        raise unsupported("logprobs", "they would tell what the output filter hides")
    try:
        options = read_sampling(
            fields, model.folder, len(prompt), model.most_tokens, schema, model.max_thought_tokens
        )
    except ApertusError as error:
        raise in_request(error, "messages") from None
    usage = read_stream_options(fields)
    streams = bool(fields.get("stream"))
    task = Task(
        prompt,
        options,
        choices=fields.get("n", 1),
        tools=tools.grammar,
        tool_names=None if schema else tools.names,
        think=think,
        top_logprobs=logprobs,
        streams=streams,
        cache_key=read_cache_key(fields),
    )
    return ChatRequest(task, streams, usage)


def _read(
    body: Mapping[str, Any], model: ServedModel
) -> tuple[list[int], dict[str, Any], Any, bool]:
    model.require_name(body.get("model"))
    fields = read_fields(body, "chat")
    if "messages" not in fields:
        raise wrong("messages", "is missing", "missing_required_parameter")
    tools = read_tool_fields(fields)
    think = _read_think(fields, model.think)
    continues = bool(fields.get("continue_final_message"))
    generates = fields.get("add_generation_prompt", not continues)
    if continues == generates:
        raise wrong("add_generation_prompt", "is the opposite of continue_final_message")
    messages = without_billing_line(fields["messages"])
    prompt = model.chat_prompt(messages, think, tools.definitions, continues)
    return prompt, fields, tools, think


def _read_think(fields: Mapping[str, Any], default: bool) -> bool:
    """Whether the model deliberates."""
    found = []
    effort = fields.get("reasoning_effort")
    if effort is not None:
        found.append(_effort("reasoning_effort", effort))
    given = fields.get("reasoning")
    if given is not None:
        given = read_object("reasoning", given, ("effort", "summary"))
        if given.get("effort") is not None:
            found.append(_effort("reasoning.effort", given["effort"]))
    given = fields.get("chat_template_kwargs")
    if given is not None:
        given = read_object("chat_template_kwargs", given, ("enable_thinking",))
        enabled = given.get("enable_thinking")
        if enabled is not None and not isinstance(enabled, bool):
            place = "chat_template_kwargs.enable_thinking"
            raise wrong(place, f"expected true or false, not {kind_of(enabled)}")
        if enabled is not None:
            found.append(enabled)
    if len(set(found)) > 1:
        raise wrong("reasoning_effort", "contradicts another field about deliberation")
    return found[0] if found else default


def _effort(name: str, value: Any) -> bool:
    if value not in EFFORTS:
        raise wrong(name, f"{shown(value)}: expected one of {', '.join(EFFORTS)}")
    return value not in ("none", "minimal")


@dataclass(slots=True)
class ChatReply:
    """What a client is told of one request's answers."""

    model: str
    task: Task
    usage: bool = False
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))
    _ended: list[Ended] = field(default_factory=list)
    _begun: set[int] = field(default_factory=set)

    def whole(self, answers: Sequence[Ended]) -> dict[str, Any]:
        """The body of an answer that is no stream."""
        return {
            **self._head("chat.completion"),
            "choices": [
                {
                    "index": each.choice,
                    "message": _message(each),
                    "logprobs": self._logprobs(each.logprobs),
                    "finish_reason": _finish(each),
                }
                for each in answers
            ],
            "usage": usage_of(answers),
        }

    def chunks(self, _: int, event: Event) -> Iterator[dict[str, Any]]:
        """What an event becomes in a stream."""
        if not isinstance(event, Told | Ended):
            return
        if event.choice not in self._begun:
            self._begun.add(event.choice)
            yield self._chunk(event.choice, {"role": "assistant", "content": ""})
        if isinstance(event, Told):
            piece = event.piece
            if piece.call is not None:
                if not piece.call.withdrawn:
                    yield self._chunk(event.choice, {"tool_calls": [_call(piece.call)]})
            elif piece.is_thought:
                thought = {"reasoning_content": piece.text, "reasoning": piece.text}
                yield self._chunk(event.choice, thought)
            else:
                logprobs = self._logprobs(event.logprobs)
                yield self._chunk(event.choice, {"content": piece.text}, logprobs=logprobs)
        else:
            self._ended.append(event)
            yield self._chunk(event.choice, {}, _finish(event))

    def last(self) -> Iterator[dict[str, Any]]:
        """What follows all answers in a stream."""
        if self.usage:
            yield {**self._chunk_head(), "choices": [], "usage": usage_of(self._ended)}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _chunk_head(self) -> dict[str, Any]:
        return self._head("chat.completion.chunk")

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        finish: str | None = None,
        logprobs: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return {**self._chunk_head(), "choices": [choice]}

    def _logprobs(self, found: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if self.task.top_logprobs is None:
            return None
        entries = [
            {**_entry(each), "top_logprobs": [_entry(other) for other in each.top]}
            for each in found
        ]
        return {"content": entries, "refusal": None}


def usage_of(answers: Sequence[Ended]) -> dict[str, Any]:
    """How many tokens there were; the prompt counts once for all its choices."""
    prompt = answers[0].answer.prompt_tokens
    made = sum(each.answer.generated_tokens for each in answers)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": made,
        "total_tokens": prompt + made,
        "prompt_tokens_details": {"cached_tokens": answers[0].cached_tokens},
        "completion_tokens_details": {
            "reasoning_tokens": sum(each.reasoning_tokens for each in answers)
        },
    }


def _message(ended: Ended) -> dict[str, Any]:
    answer = ended.answer
    message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None}
    if not answer.text and (answer.tool_calls or answer.thought):
        message["content"] = None
    if answer.thought:
        message["reasoning_content"] = message["reasoning"] = answer.thought
    if answer.tool_calls:
        # As far as the model wrote them, as in a stream: a cut call is never completed.
        message["tool_calls"] = [
            {
                "id": each.id,
                "type": "function",
                "function": {"name": each.name, "arguments": each.arguments},
            }
            for each in answer.tool_calls
        ]
    return message


def _finish(ended: Ended) -> str:
    return "stop" if ended.answer.finish_reason == "cancelled" else ended.answer.finish_reason


def _call(piece: CallPiece) -> dict[str, Any]:
    """A part of a call: its name once, then arguments alone, which clients join."""
    if piece.id is not None:
        function = {"name": piece.name, "arguments": piece.arguments}
        return {"index": piece.index, "id": piece.id, "type": "function", "function": function}
    return {"index": piece.index, "function": {"arguments": piece.arguments}}


def _entry(found: TokenLogprob) -> dict[str, Any]:
    return {"token": found.text, "logprob": found.logprob, "bytes": list(found.data)}
