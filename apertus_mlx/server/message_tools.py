"""Tools and the choice among them, as a body of `/v1/messages` has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from apertus_mlx.server.errors import ApiError, wrong
from apertus_mlx.server.fields import Flag, kind_of, read_object, shown, unsupported
from apertus_mlx.server.tool_fields import ChosenTools, read_tool_fields, tool_list

# What neither changes the prompt nor the answer.
IGNORED_OF_TOOLS = ("cache_control", "eager_input_streaming")
_OF_TOOLS = ("name", "description", "input_schema", "strict", "type", *IGNORED_OF_TOOLS)
# Values of other keys that say what is so anyway.
_HARMLESS = {"defer_loading": False, "allowed_callers": ["direct"], "input_examples": []}
CHOICES = {"auto": "auto", "any": "required", "tool": "", "none": "none"}


def read_message_tools(fields: Mapping[str, Any]) -> ChosenTools:
    """The tools of a body, and which may or must be called.

    Raises:
        ApiError: 400, a tool or the choice is wrong.
    """
    tools = [_tool(f"tools[{index}]", each) for index, each in enumerate(tool_list(fields))]
    choice = _choice(fields.get("tool_choice"))
    try:
        return read_tool_fields({"tools": tools, **choice})
    except ApiError as error:
        message = error.message.replace(".function.parameters", ".input_schema")
        message = message.replace(".function.", ".")
        raise ApiError(error.status, message, param=error.param, code=error.code) from None


def _tool(place: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise wrong(place, f"expected an object, not {kind_of(value)}")
    kind = value.get("type")
    if kind not in (None, "custom"):
        words = f"{shown(kind)} is not supported; the server runs no tools"
        raise wrong(f"{place}.type", words, "unsupported_parameter")
    for key, each in value.items():
        if key not in _OF_TOOLS and each is not None and each != _HARMLESS.get(key, ...):
            raise unsupported(f"{place}.{key}")
    if value.get("input_schema") is None:
        raise wrong(f"{place}.input_schema", "is missing", "missing_required_parameter")
    strict = value.get("strict")
    function = {
        "name": value.get("name"),
        "description": value.get("description"),
        "parameters": value["input_schema"],
        "strict": None if strict is None else Flag().read(f"{place}.strict", strict),
    }
    return {"type": "function", "function": function}


def _choice(value: Any) -> dict[str, Any]:
    """The choice in OpenAI's fields."""
    if value is None:
        return {}
    place = "tool_choice"
    value = read_object(place, value, ("type", "name", "disable_parallel_tool_use"))
    kind = value.get("type")
    if not isinstance(kind, str) or kind not in CHOICES:
        raise wrong(f"{place}.type", f"{shown(kind)}: expected one of {', '.join(CHOICES)}")
    found: dict[str, Any] = {"tool_choice": CHOICES[kind]}
    if kind == "tool":
        if not isinstance(value.get("name"), str):
            raise wrong(f"{place}.name", f"expected a text, not {kind_of(value.get('name'))}")
        found = {"tool_choice": {"type": "function", "function": {"name": value["name"]}}}
    elif value.get("name") is not None:
        raise wrong(f"{place}.name", "needs the type tool")
    alone = value.get("disable_parallel_tool_use")
    if alone is not None and Flag().read(f"{place}.disable_parallel_tool_use", alone):
        found["parallel_tool_calls"] = False
    return found
