"""POST /v1/messages: from Anthropic's body to what the engine computes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from apertus_mlx.errors import ApertusError
from apertus_mlx.server.errors import ApiError, in_request, wrong
from apertus_mlx.server.fields import (
    Whole,
    kind_of,
    read_cache_key,
    read_fields,
    read_object,
    shown,
)
from apertus_mlx.server.jobs import Task
from apertus_mlx.server.message_blocks import read_conversation
from apertus_mlx.server.message_fields import MESSAGE_FIELDS
from apertus_mlx.server.message_tools import read_message_tools
from apertus_mlx.server.sampling_fields import read_sampling
from apertus_mlx.server.served_model import ServedModel
from apertus_mlx.server.tool_fields import ChosenTools, read_response_format

EFFORTS = ("low", "medium", "high", "xhigh", "max")
THINKING = ("enabled", "adaptive", "disabled")
DISPLAYS = ("summarized", "omitted")


@dataclass(frozen=True, slots=True)
class Thinking:
    """Whether the model deliberates.

    Attributes:
        wanted: whether it does.
        budget: for how many tokens at most.
        told: whether the client is told what it thinks.
        adapts: whether it may be left out where the model cannot.
    """

    wanted: bool
    budget: int | None = None
    told: bool = True
    adapts: bool = False


@dataclass(frozen=True, slots=True)
class MessageRequest:
    """A checked request.

    Attributes:
        task: what is to be computed.
        thoughts: whether they are told.
        certain_calls: whether a call that has begun is sure to become one.
    """

    task: Task
    thoughts: bool
    certain_calls: bool


def count_message_tokens(body: Mapping[str, Any], model: ServedModel) -> dict[str, Any]:
    """POST /v1/messages/count_tokens: how long the prompt is, even where it is too long."""
    return {"input_tokens": len(_read(body, model)[0])}


def read_message_request(body: Mapping[str, Any], model: ServedModel) -> MessageRequest:
    """Check a body; may take seconds.

    Raises:
        ApiError: 400, something in it is wrong; 404, another model.
    """
    prompt, fields, tools, thinking = _read(body, model)
    if "max_tokens" not in fields:
        raise wrong("max_tokens", "is missing", "missing_required_parameter")
    if thinking.budget is not None and thinking.budget >= fields["max_tokens"]:
        raise wrong("thinking.budget_tokens", "must be less than max_tokens")
    schema = _read_schema(fields.get("output_config"))
    grammar = tools.grammar
    if schema is not None or (grammar is not None and grammar.grammar is not None):
        model.warm_grammars()
    stop = fields.get("stop_sequences")
    if stop is not None and not isinstance(stop, list):
        raise wrong("stop_sequences", f"expected a list of texts, not {kind_of(stop)}")
    most = [each for each in (thinking.budget, model.max_thought_tokens) if each is not None]
    try:
        options = read_sampling(
            {**fields, "stop": stop},
            model.folder,
            len(prompt),
            model.most_tokens,
            schema,
            min(most, default=None),
        )
    except ApiError as error:
        raise _in_our_words(error) from None
    except ApertusError as error:
        raise in_request(error, "messages") from None
    task = Task(
        prompt,
        options,
        tools=grammar,
        tool_names=None if schema else tools.names,
        think=thinking.wanted,
        streams=bool(fields.get("stream")),
        cache_key=read_cache_key(fields),
    )
    return MessageRequest(task, thinking.told, model.calls_are_certain(grammar))


def _read(
    body: Mapping[str, Any], model: ServedModel
) -> tuple[list[int], dict[str, Any], ChosenTools, Thinking]:
    model.require_name(body.get("model"))
    fields = read_fields(body, "messages", MESSAGE_FIELDS)
    if "messages" not in fields:
        raise wrong("messages", "is missing", "missing_required_parameter")
    messages = read_conversation(fields.get("system"), fields["messages"])
    tools = read_message_tools(fields)
    thinking = _read_thinking(fields.get("thinking"), model.think)
    continues = messages[-1]["role"] == "assistant"
    if thinking.adapts and tools.definitions and thinking.wanted:
        template = model.folder.template
        wanted = template is None or template.thinks_with_tools
        thinking = replace(thinking, wanted=wanted)
    try:
        prompt = model.chat_prompt(messages, thinking.wanted, tools.definitions, continues)
    except ApiError as error:
        raise _in_our_words(error) from None
    return prompt, fields, tools, thinking


def _read_thinking(value: Any, default: bool) -> Thinking:
    if value is None:
        return Thinking(default)
    place = "thinking"
    value = read_object(place, value, ("type", "budget_tokens", "display"))
    kind, budget, display = value.get("type"), value.get("budget_tokens"), value.get("display")
    if kind not in THINKING:
        raise wrong(f"{place}.type", f"{shown(kind)}: expected one of {', '.join(THINKING)}")
    if display is not None and display not in DISPLAYS:
        raise wrong(f"{place}.display", f"{shown(display)}: expected {' or '.join(DISPLAYS)}")
    if kind == "enabled":
        if budget is None:
            raise wrong(f"{place}.budget_tokens", "is missing", "missing_required_parameter")
        budget = Whole(1, 2**31 - 1).read(f"{place}.budget_tokens", budget)
    elif budget is not None:
        raise wrong(f"{place}.budget_tokens", "needs the type enabled")
    return Thinking(kind != "disabled", budget, display != "omitted", kind == "adaptive")


def _read_schema(value: Any) -> str | None:
    if value is None:
        return None
    place = "output_config"
    value = read_object(place, value, ("format", "effort"))
    effort = value.get("effort")
    if effort is not None and effort not in EFFORTS:
        raise wrong(f"{place}.effort", f"{shown(effort)}: expected one of {', '.join(EFFORTS)}")
    if value.get("format") is None:
        return None
    found = read_object(f"{place}.format", value["format"], ("type", "schema"))
    if found.get("type") != "json_schema":
        words = "is not supported; expected json_schema"
        raise wrong(f"{place}.format.type", words, "unsupported_parameter")
    given = {"name": "answer", "schema": found.get("schema")}
    try:
        return read_response_format({"type": "json_schema", "json_schema": given})
    except ApiError as error:
        theirs, ours = "response_format.json_schema", f"{place}.format"
        message = error.message.replace(theirs, ours)
        raise ApiError(error.status, message, param=ours, code=error.code) from None


def _in_our_words(error: ApiError) -> ApiError:
    """The same error as a client of this API knows it."""
    message = error.message
    if error.code == "context_length_exceeded":
        # Clients look for this pattern. The answer needs a token of the context, too.
        tokens, context = map(int, re.findall(r"\d+", message)[:2])
        message = f"prompt is too long: {tokens} tokens > {context - 1} maximum"
    elif error.param is not None and error.param.startswith("stop"):
        message = message.replace("stop", "stop_sequences", 1)
    return ApiError(error.status, message, param=error.param, code=error.code,
                    headers=error.headers)  # fmt: skip
