"""Tools, the choice among them, and the form of the answer, as a body of a chat has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from apertus_mlx.errors import UsageError
from apertus_mlx.generation.grammar import check_grammar, require_engine, schema_grammar
from apertus_mlx.generation.json_schema import read_schema
from apertus_mlx.generation.tool_grammar import ToolGrammar
from apertus_mlx.server.errors import in_request, wrong
from apertus_mlx.server.fields import MOST_TOOLS, kind_of, read_object, shown
from apertus_mlx.text.given import FUNCTION_NAME
from apertus_mlx.text.tool_definitions import read_tools


@dataclass(frozen=True, slots=True)
class ChosenTools:
    """The tools of a request.

    Attributes:
        definitions: all of them, as the template takes them.
        grammar: what the model may call.
        names: of the tools whose calls may come without control tokens; None: none may.
    """

    definitions: Sequence[Mapping[str, Any]] = field(default_factory=list)
    grammar: ToolGrammar | None = None
    names: Sequence[str] | None = None


def read_tool_fields(fields: Mapping[str, Any]) -> ChosenTools:
    """The tools of a body, and which may or must be called.

    Raises:
        ApiError: 400, a definition or the choice is wrong.
    """
    given = tool_list(fields)
    try:
        definitions = read_tools(given)
    except UsageError as error:
        raise in_request(error, "tools") from None
    choice, allowed = _choice(fields.get("tool_choice"), definitions)
    if not definitions:
        if choice not in ("auto", "none"):
            raise wrong("tool_choice", "there are no tools")
        return ChosenTools()
    parallel = fields.get("parallel_tool_calls", True)
    try:
        for index, (tool, read) in enumerate(zip(given, definitions, strict=True)):
            if _is_strict(tool, index):
                ToolGrammar([read], strict=True)
    except UsageError as error:
        raise in_request(error, "tools") from None
    try:
        grammar = ToolGrammar(allowed, choice, parallel)
    except UsageError as error:
        raise in_request(error, "tool_choice") from None
    names = [each["name"] for each in allowed] if choice != "none" else None
    return ChosenTools(definitions, grammar, names)


def tool_list(fields: Mapping[str, Any]) -> list[Any]:
    """What a body lists as its tools, not yet read; empty where there is none.

    Raises:
        ApiError: 400, it is no list, or too long.
    """
    given = fields.get("tools")
    if given is not None and not isinstance(given, list):
        raise wrong("tools", f"expected a list, not {kind_of(given)}")
    if given and len(given) > MOST_TOOLS:
        raise wrong("tools", f"has {len(given)} tools; at most {MOST_TOOLS}")
    return given or []


def _is_strict(tool: Mapping[str, Any], index: int) -> bool:
    function = tool["function"] if isinstance(tool.get("function"), dict) else tool
    strict = function.get("strict")
    if strict is not None and not isinstance(strict, bool):
        raise wrong(
            f"tools[{index}].function.strict", f"expected true or false, not {strict!r:.40}"
        )
    return bool(strict)


def _choice(value: Any, definitions: list[dict[str, Any]]) -> tuple[str, list[dict[str, Any]]]:
    """The choice, and the tools that it is among."""
    if value is None:
        return "auto", definitions
    if isinstance(value, str):
        if value not in ("auto", "none", "required"):
            raise wrong("tool_choice", f"{shown(value)}: expected auto, none or required")
        return value, definitions
    if not isinstance(value, dict):
        raise wrong("tool_choice", f"expected a text or an object, not {kind_of(value)}")
    if value.get("type") == "function":
        return _named(value, "tool_choice", definitions), definitions
    if value.get("type") != "allowed_tools":
        raise wrong("tool_choice.type", "is not supported; expected function or allowed_tools")
    inner = value.get("allowed_tools")
    place = "tool_choice.allowed_tools"
    inner = read_object(place, inner, ("mode", "tools"))
    mode, tools = inner.get("mode"), inner.get("tools")
    if mode not in ("auto", "required"):
        raise wrong(f"{place}.mode", "expected auto or required")
    if not isinstance(tools, list) or not tools:
        raise wrong(f"{place}.tools", "expected a list of tools")
    names = {_named(each, f"{place}.tools[{i}]", definitions) for i, each in enumerate(tools)}
    return mode, [each for each in definitions if each["name"] in names]


def _named(value: Any, place: str, definitions: list[dict[str, Any]]) -> str:
    """The name of a declared tool in `{type: function, function: {name}}`."""
    function = value.get("function") if isinstance(value, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise wrong(place, "expected {type: function, function: {name}}")
    if name not in [each["name"] for each in definitions]:
        raise wrong(place, f"there is no tool {shown(name)}")
    return name


def read_response_format(value: Any) -> str | None:
    """The schema that an answer follows, as JSON; None for text.

    Raises:
        ApiError: 400, it is wrong, or not supported.
    """
    if value is None:
        return None
    place = "response_format"
    value = read_object(place, value, ("type", "json_schema"))
    kind = value.get("type")
    if kind == "text":
        return None
    schema: Any = {"type": "object"}
    if kind == "json_schema":
        given = read_object(
            f"{place}.json_schema",
            value.get("json_schema"),
            ("name", "description", "schema", "strict"),
        )
        name = given.get("name")
        if not isinstance(name, str) or not FUNCTION_NAME.fullmatch(name):
            raise wrong(f"{place}.json_schema.name", "expected 1 to 64 of a-z A-Z 0-9 _ -")
        strict = given.get("strict")
        if strict is not None and not isinstance(strict, bool):
            raise wrong(f"{place}.json_schema.strict", "expected true or false")
        schema = given.get("schema")
        place = f"{place}.json_schema.schema"
        if not isinstance(schema, dict):
            raise wrong(place, f"expected an object, not {kind_of(schema)}")
    elif kind != "json_object":
        words = "is not supported; expected text, json_object or json_schema"
        raise wrong(f"{place}.type", words, "unsupported_parameter")
    try:
        text = read_schema(schema, place)
        require_engine(place)
        check_grammar(schema_grammar(text), place)
    except UsageError as error:
        raise in_request(error, place) from None
    return text
