"""Tools as OpenAI writes them; their TypeScript is what plain Jinja makes of the v1 template."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from apertus_mlx.errors import UsageError, WrongTypeError
from apertus_mlx.text.tool_definitions import format_tools, read_tools
from tests.chat_templates import V1, render_with_jinja

NAMES = ["city", "unit", "items", "type", "Größe", "a b", "values", "get", "<s>"]
WORDS = ["City name", "", "ein Wort\nund noch eins", '"quoted" \\ {{ x }}', "日本", "<|user_end|>"]
VALUES: list[Any] = [None, True, 1, -2.5, "C", "", [1, "ü"], {"a": {"b": None}}]


def random_schema(random_source: random.Random, depth: int) -> Any:
    """A schema as programs write them: mostly sound, with what occurs in the wild."""
    pick, chance = random_source.choice, random_source.random
    kinds: list[Any] = ["string", "number", "integer", "boolean", "null", None, "thing"]
    kinds += ["array", "object"] * 3 if depth else []
    kinds += [["string", "null"], ["object", "object"], ["number"], []]
    kind = pick(kinds)
    spec: dict[str, Any] = {} if kind is None else {"type": kind}
    if chance() < 0.4:
        spec["description"] = pick(WORDS)
    if chance() < 0.3:
        spec["default"] = pick(VALUES)
    if chance() < 0.3:
        spec["enum"] = random_source.sample(
            ["C", "F", "é", 1, None, True], random_source.randint(0, 4)
        )
    if chance() < 0.2:
        spec["nullable"] = pick([True, False])
    if kind == "array" and chance() < 0.8:
        spec["items"] = pick([random_schema(random_source, depth - 1)] * 4 + [{}, True, None])
    if kind == "object" and chance() < 0.8:
        spec.update(random_properties(random_source, depth - 1))
    if depth and chance() < 0.15:
        spec["oneOf"] = [random_schema(random_source, depth - 1) for _ in range(pick([0, 1, 2, 3]))]
    if chance() < 0.1:
        spec["anyOf"] = [{"type": "string"}, {"$ref": "#/x"}]
    return spec


def random_properties(random_source: random.Random, depth: int) -> dict[str, Any]:
    names = random_source.sample(NAMES, random_source.randint(0, 4))
    properties = {name: random_schema(random_source, depth) for name in names}
    found: dict[str, Any] = {"type": "object", "properties": properties}
    if random_source.random() < 0.7:
        found["required"] = [name for name in names if random_source.random() < 0.5]
    return found


def random_tools(random_source: random.Random) -> list[dict[str, Any]]:
    tools = []
    for index in range(random_source.randint(1, 3)):
        tool: dict[str, Any] = {"name": f"tool_{index}", "description": random_source.choice(WORDS)}
        if random_source.random() < 0.9:
            tool["parameters"] = random_properties(random_source, 3)
        wrapped = {"type": "function", "function": {**tool, "strict": True}}
        tools.append(random_source.choice([tool, wrapped]))
    return tools


def by_template(tools: list[dict[str, Any]]) -> str:
    text = render_with_jinja(V1, [], tools=json.loads(json.dumps(tools)))
    return text.split("Tool Capabilities:\n", 1)[1].removesuffix("<|developer_end|>")


def test_the_form_is_that_of_the_v1_template() -> None:
    random_source = random.Random(0)
    for _ in range(400):
        tools = read_tools(random_tools(random_source))
        assert format_tools(tools) == by_template(tools)


@pytest.mark.parametrize("size", [50, 51])
def test_a_long_type_of_an_element_is_any(size: int) -> None:
    array = {"type": "array", "items": {"type": ["x" * size]}}
    tools = read_tools([{"name": "f", "parameters": {"properties": {"a": array}}}])
    assert format_tools(tools) == by_template(tools)
    assert ("any[]" in format_tools(tools)) is (size > 50)


def test_worked_strings() -> None:
    place = {"type": "object", "properties": {"x": {"type": "number"}, "y": {"type": "string"}}}
    properties = {
        "city": {"type": "string", "description": "City name"},
        "unit": {"type": "string", "enum": ["C", "F"], "default": "C"},
        "days": {"type": "integer", "default": 1},
        "place": {**place, "required": ["x"]},
        "places": {"type": "array", "items": place},
        "level": {"type": "integer", "enum": [1, 2], "default": 1},
        "anything": True,
    }
    tools = [
        {
            "name": "get_weather",
            "description": "Get current weather",
            "parameters": {"properties": properties, "required": ["city"]},
        },
        {"name": "now", "description": None},
    ]
    nested = "\n" + " " * 16
    assert format_tools(read_tools(tools)) == (
        "// Get current weather\ntype get_weather = (_: {\n// City name\ncity: string,\n"
        'unit?: "C" | "F", // default: C,\ndays?: number, // default: 1,\n'
        f"place?: {{\nx: {nested}number, y?: {nested}string}},\nplaces?: any[],\n"
        "level?: number, // default: 1,\nanything?: any\n}) => any;\n// now\ntype now = () => any;"
    )
    assert properties["anything"] is True  # what was given stays


def function(**values: Any) -> list[Any]:
    return [{"type": "function", "function": {"name": "f", **values}}]


def parameters(**properties: Any) -> list[Any]:
    return function(parameters={"type": "object", "properties": properties})


DEEP: dict[str, Any] = {}
for _ in range(100):
    DEEP = {"properties": {"a": DEEP}}
REFUSED: dict[str, tuple[Any, str]] = {
    "another type": ([{"type": "web_search"}], "tools[0].type: 'web_search' is not supported"),
    "a name with blanks": (function(name="a b"), "tools[0].function.name: 'a b'"),
    "a long name": ([{"name": "f" * 65}], "tools[0].name: 'fff"),
    "the same name": (function() * 2, "tools[1].function.name: 'f' is the name of an earlier tool"),
    "parameters of another type": (
        function(parameters={"type": "array"}),
        "tools[0].function.parameters.type: the parameters",
    ),
    "a deep schema": (function(parameters=DEEP), "tools[0].function.parameters: is nested more"),
    "a default of NaN": (
        parameters(a={"default": float("nan")}),
        "tools[0].function.parameters.properties.a.default: nan is no number",
    ),
    "a surrogate": (
        parameters(a={"enum": ["\udc80"]}),
        "tools[0].function.parameters: holds a lone surrogate",
    ),
}
WRONG_TYPES: dict[str, tuple[Any, str]] = {
    "no list": ({"name": "f"}, "tools: expected a list of tools, not dict"),
    "no object": (["f"], "tools[0]: expected an object, not str"),
    "no name": ([{"type": "function", "function": {}}], "tools[0].function.name: expected a text"),
    "a description": (function(description=3), "tools[0].function.description: expected a text"),
    "parameters": (function(parameters=[]), "tools[0].function.parameters: expected an object"),
    "a schema": (parameters(a=3), "tools[0].function.parameters.properties.a: expected an object"),
    "a choice": (
        parameters(a={"oneOf": ["string"]}),
        "tools[0].function.parameters.properties.a.oneOf[0]: expected an object",
    ),
    "an enumeration": (
        parameters(a={"enum": "C"}),
        "tools[0].function.parameters.properties.a.enum: expected a list",
    ),
    "words": (
        parameters(a={"type": "array", "items": {"description": 3}}),
        "tools[0].function.parameters.properties.a.items.description: expected a text",
    ),
    "no data": (
        parameters(a={"default": {1, 2}}),
        "tools[0].function.parameters.properties.a.default: expected data",
    ),
    "a key": (
        parameters(**{"a": {3: 4}}),
        "tools[0].function.parameters.properties.a: has a key 3",
    ),
}


@pytest.mark.parametrize("row", [*REFUSED, *WRONG_TYPES])
def test_what_is_refused_is_named_by_its_place(row: str) -> None:
    tools, words = {**REFUSED, **WRONG_TYPES}[row]
    with pytest.raises(UsageError) as caught:
        read_tools(tools)
    assert str(caught.value).startswith(words)
    assert isinstance(caught.value, WrongTypeError) is (row in WRONG_TYPES)


def test_no_tools() -> None:
    assert read_tools(None) == read_tools([]) == []
