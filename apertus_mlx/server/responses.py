"""POST /v1/responses: from its body to that of a chat, and to what the engine computes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from apertus_mlx.errors import ApertusError
from apertus_mlx.server.chat_completions import read_chat, read_chat_prompt
from apertus_mlx.server.errors import ApiError, in_request, wrong
from apertus_mlx.server.fields import kind_of, read_fields, read_object, shown
from apertus_mlx.server.jobs import Task
from apertus_mlx.server.response_fields import (
    MOST_METADATA,
    MOST_METADATA_KEY,
    MOST_METADATA_VALUE,
    PASSED_ON,
    RESPONSE_FIELDS,
)
from apertus_mlx.server.response_items import Conversation
from apertus_mlx.server.response_store import ResponseStore
from apertus_mlx.server.sampling_fields import require_text
from apertus_mlx.server.served_model import ServedModel
from apertus_mlx.server.tool_fields import tool_list

# Codex offers these with each request. They are run by a server, and this one offers none.
LEFT_OUT_TOOLS = ("web_search", "image_generation", "namespace")
INCLUDED = ("reasoning.encrypted_content",)
_TOOL_KEYS = ("type", "name", "description", "parameters", "strict")
# How a chat's fields are called here.
_NAMES = (
    ("response_format.json_schema", "text.format"),
    ("response_format", "text.format"),
    ("reasoning_effort", "reasoning.effort"),
    ("max_completion_tokens", "max_output_tokens"),
    ("tool_choice.allowed_tools", "tool_choice"),
    ("messages", "input"),
)
_MESSAGE, _TOOL = re.compile(r"^messages\[(\d+)\]"), re.compile(r"^tools\[(\d+)\]")


@dataclass(frozen=True, slots=True)
class Places:
    """Where the parts of a chat's body come from.

    Attributes:
        messages: the place in the request of each message.
        tools: the number in the request of each tool.
    """

    messages: Sequence[str]
    tools: Sequence[int]

    def named_here(self, error: ApiError) -> ApiError:
        """An error of a chat, with the names that this API has."""
        message, param = error.message, error.param
        if param is not None:
            here = self._place(param)
            message, param = message.replace(param, here, 1), here
        return ApiError(error.status, message, param=param, code=error.code, headers=error.headers)

    def _place(self, param: str) -> str:
        if found := _MESSAGE.match(param):
            # The rest is a place in a chat's message, which the client did not write.
            return self.messages[int(found[1])]
        if found := _TOOL.match(param):
            rest = param[found.end() :].replace(".function", "", 1)
            return f"tools[{self.tools[int(found[1])]}]{rest}"
        for theirs, ours in _NAMES:
            if param.startswith(theirs):
                return ours + param.removeprefix(theirs)
        return param


@dataclass(frozen=True, slots=True)
class ResponseRequest:
    """A checked request.

    Attributes:
        task: what is to be computed.
        fields: of the body, those given.
        items: of the whole conversation.
        keeps: whether the response is kept.
        certain_calls: whether a call that has begun is sure to become one.
    """

    task: Task
    fields: Mapping[str, Any]
    items: Sequence[Any]
    keeps: bool
    certain_calls: bool


def read_response(
    store: ResponseStore, body: Mapping[str, Any], model: ServedModel
) -> ResponseRequest:
    """Check a body; may take seconds.

    Raises:
        ApiError: 400, something in it is wrong; 404, another model.
    """
    fields, items, chat, places = _as_chat(store, body, model)
    try:
        asked = read_chat(chat, model)
    except ApiError as error:
        raise places.named_here(error) from None
    certain = model.calls_are_certain(asked.task.tools)
    return ResponseRequest(asked.task, fields, items, fields.get("store", True), certain)


def count_response_input(
    store: ResponseStore, body: Mapping[str, Any], model: ServedModel
) -> dict[str, Any]:
    """POST /v1/responses/input_tokens: how long the prompt of a body is."""
    _, _, chat, places = _as_chat(store, body, model)
    try:
        ids = read_chat_prompt(chat, model)
        model.folder.require_room(len(ids))
    except ApiError as error:
        raise places.named_here(error) from None
    except ApertusError as error:
        raise in_request(error, "input") from None
    return {"object": "response.input_tokens", "input_tokens": len(ids)}


def _as_chat(
    store: ResponseStore, body: Mapping[str, Any], model: ServedModel
) -> tuple[dict[str, Any], Sequence[Any], dict[str, Any], Places]:
    """The fields, all items, the body of the same chat, and where it comes from."""
    model.require_name(body.get("model"))
    fields = read_fields(body, "responses", RESPONSE_FIELDS)
    given = fields.get("input")
    if given is None:
        raise wrong("input", "is missing", "missing_required_parameter")
    if not isinstance(given, str | list):
        raise wrong("input", f"expected a text or a list of items, not {kind_of(given)}")
    if not given:
        raise wrong("input", "is empty")
    if isinstance(given, str):
        require_text("input", given)
        items: list[Any] = [{"type": "message", "role": "user", "content": given}]
    else:
        items = given
    before: Sequence[Any] = ()
    name = "previous_response_id"
    if name in fields:
        before = store.before(require_text(name, fields[name]))
    instructions = fields.get("instructions")
    if instructions is not None:
        require_text("instructions", instructions)
    conversation = Conversation(instructions)
    conversation.add(before, name)
    conversation.add(items, "input")
    _check_include(fields.get("include"))
    _check_metadata(fields.get("metadata"))
    chat = {key: fields[key] for key in PASSED_ON if key in fields}
    chat |= {
        "messages": conversation.messages,
        "max_completion_tokens": fields.get("max_output_tokens"),
        "tools": _tools(tool_list(fields)),
        "tool_choice": _tool_choice(fields.get("tool_choice")),
        "response_format": _format(fields.get("text")),
        "reasoning_effort": _effort(fields.get("reasoning")),
    }
    kept = [index for index, tool in enumerate(fields.get("tools") or ()) if not _left_out(tool)]
    return fields, [*before, *items], chat, Places(conversation.places, kept)


def _tools(given: Sequence[Any]) -> list[Any]:
    """The functions as a chat has them."""
    found = []
    for index, tool in enumerate(given):
        place = f"tools[{index}]"
        if _left_out(tool):
            continue
        kind = tool.get("type") if isinstance(tool, dict) else None
        if kind != "function":
            words = f"{shown(kind)} is not supported; expected function"
            raise wrong(f"{place}.type", words, "unsupported_parameter")
        found.append(dict(read_object(place, tool, _TOOL_KEYS)))
    return found


def functions_of(tools: Sequence[Any] | None) -> list[Any]:
    """The tools of a checked body that the model is told of."""
    return [tool for tool in tools or () if not _left_out(tool)]


def _left_out(tool: Any) -> bool:
    return isinstance(tool, dict) and tool.get("type") in LEFT_OUT_TOOLS


def _tool_choice(value: Any) -> Any:
    """The choice as a chat has it."""
    if not isinstance(value, dict):
        return value
    if value.get("type") == "function":
        return _chosen(value)
    if value.get("type") != "allowed_tools":
        words = f"{shown(value.get('type'))} is not supported; expected function or allowed_tools"
        raise wrong("tool_choice.type", words, "unsupported_parameter")
    read_object("tool_choice", value, ("type", "mode", "tools"))
    tools = value.get("tools")
    if isinstance(tools, list):
        tools = [_chosen(each) if isinstance(each, dict) else each for each in tools]
    return {"type": "allowed_tools", "allowed_tools": {"mode": value.get("mode"), "tools": tools}}


def _chosen(value: dict[str, Any]) -> dict[str, Any]:
    return {"type": value.get("type"), "function": {"name": value.get("name")}}


def _format(value: Any) -> Any:
    """The form of the answer as a chat has it."""
    if value is None:
        return None
    given = read_object("text", value, ("format", "verbosity")).get("format")
    if given is None:
        return None
    if isinstance(given, dict) and given.get("type") == "json_schema":
        inner = {key: each for key, each in given.items() if key != "type"}
        return {"type": "json_schema", "json_schema": inner}
    return read_object("text.format", given, ("type",))


def _effort(value: Any) -> Any:
    if value is None:
        return None
    given = read_object("reasoning", value, ("effort", "summary", "generate_summary"))
    for key in ("summary", "generate_summary"):
        if given.get(key) not in (None, "auto"):
            words = f"{shown(given[key])} is not supported; expected auto"
            raise wrong(f"reasoning.{key}", words, "unsupported_parameter")
    return given.get("effort")


def _check_include(value: Any) -> None:
    if value is None:
        return
    if not isinstance(value, list):
        raise wrong("include", f"expected a list, not {kind_of(value)}")
    for index, each in enumerate(value):
        if each not in INCLUDED:
            words = f"{shown(each)} is not supported"
            raise wrong(f"include[{index}]", words, "unsupported_parameter")


def _check_metadata(value: Any) -> None:
    if value is None:
        return
    if not isinstance(value, dict):
        raise wrong("metadata", f"expected an object, not {kind_of(value)}")
    if len(value) > MOST_METADATA:
        raise wrong("metadata", f"has {len(value)} keys; at most {MOST_METADATA}")
    for key, each in value.items():
        if len(require_text("metadata", key)) > MOST_METADATA_KEY:
            raise wrong("metadata", f"a key is longer than {MOST_METADATA_KEY} characters")
        if len(require_text("metadata", each)) > MOST_METADATA_VALUE:
            raise wrong("metadata", f"a text is longer than {MOST_METADATA_VALUE} characters")
