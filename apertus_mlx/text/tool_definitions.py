"""Tools that a model may call: definitions as OpenAI writes them, checked, and in TypeScript."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from apertus_mlx.text.given import Given

MAX_ARRAY_TYPE = 50  # characters of an element's type, beyond which an array is `any[]`
# The break and the blanks belong to the format that the models were trained on.
_BEFORE_NESTED_TYPE = "\n" + " " * 16
_BEFORE_DEFAULT_OF_A_CHOICE = " " * 20


def read_tools(tools: object, name: str = "tools") -> list[dict[str, Any]]:
    """Return tools as Apertus templates take them, each `{name, description, parameters}`.

    A tool without a description is described by its name. Schemas are left as they are but for
    what a template cannot write.

    Args:
        tools: A list of these, or of `{"type": "function", "function": {...}}`; None for none.
        name: What error messages call them.

    Raises:
        UsageError: what no prompt can be made of, named as `tools[1].function.name: ...`; a
            `WrongTypeError` for values of a wrong type.
    """
    found: dict[str, dict[str, Any]] = {}
    for tool in [] if tools is None else Given(tools, name).list("a list of tools"):
        function = _function(tool)
        name_given = function["name"]
        text = name_given.name()
        if text in found:
            name_given.refuse(f"{text!r} is the name of an earlier tool, too")
        description = function["description"]
        words = text if description.value in (None, "") else description.text()
        found[text] = {"name": text, "description": words, "parameters": _schema(function)}
    return list(found.values())


def _function(tool: Given) -> Given:
    """Return what a tool's wrapper holds, or the tool without one."""
    kind = tool["type"]
    if kind.value not in (None, "function"):
        kind.refuse(f"{kind.value!r:.40} is not supported; tools are of type 'function'")
    return tool if tool["function"].value is None else tool["function"]


def _schema(function: Given) -> dict[str, Any]:
    parameters = function["parameters"]
    if parameters.value is None:
        return {}
    if parameters["type"].value not in (None, "object"):
        parameters["type"].refuse("the parameters of a function are an object")
    schema: dict[str, Any] = json.loads(parameters.json())
    given = Given(schema, parameters.place)
    _check(given)
    for spec in (schema.get("properties") or {}).values():
        # Beside choices a template writes a default as a text, which it has to be.
        if (spec.get("enum") or spec.get("oneOf")) and not isinstance(spec.get("default", ""), str):
            spec["default"] = _json(spec["default"])
    return schema


def _check(spec: Given) -> None:
    """Refuse what is no schema; one that is true or false becomes one of anything."""
    schema: dict[str, Any] = spec.value
    for key in ("enum", "oneOf"):
        _ = schema.get(key) is None or spec[key].list()
    if schema.get("description") is not None:
        spec["description"].text()
    inner = spec["oneOf"].list() if schema.get("oneOf") else []
    if schema.get("properties") is not None:
        spec["properties"].object()
        properties: dict[str, Any] = schema["properties"]
        properties.update({key: {} for key in properties if isinstance(properties[key], bool)})
        inner += [spec["properties"][key] for key in properties]
        for name in [] if schema.get("required") is None else spec["required"].list():
            name.text()
    for each in inner:
        each.object()
    if isinstance(schema.get("items"), dict):
        inner.append(spec["items"])
    for each in inner:
        _check(each)


def format_tools(tools: Sequence[Mapping[str, Any]]) -> str:
    """Return tools, as `read_tools` does, in the form that the v1 template writes them in.

    The v1.1 template takes this text as `formatted_tools`. Its file was not at hand when this was
    written; that it expects the form of v1 is known from renderings of it alone.
    """
    return "\n".join(map(_declaration, tools))


def _declaration(tool: Mapping[str, Any]) -> str:
    properties = tool["parameters"].get("properties")
    start = f"// {tool['description']}\ntype {tool['name']} = "
    if not properties:
        return f"{start}() => any;"
    required = tool["parameters"].get("required") or []
    lines = [_parameter(name, spec, name in required) for name, spec in properties.items()]
    return f"{start}(_: {{\n" + ",\n".join(lines) + "\n}) => any;"


def _parameter(name: str, spec: Mapping[str, Any], required: bool) -> str:
    about = f"// {spec['description']}\n" if spec.get("description") else ""
    text = f"{about}{name}{'' if required else '?'}: {_type(spec)}"
    if "default" not in spec:
        return text
    if spec.get("enum"):
        return f"{text}, // default: {spec['default']}"
    if spec.get("oneOf"):
        return f"{text}// default: {spec['default']}"
    return f"{text}, // default: {_json(spec['default'])}"


def _type(spec: Any) -> str:
    if not isinstance(spec, Mapping):
        return "any"
    kind = spec.get("type")
    if kind == "array":
        return _element_type(spec.get("items")) + "[]" + _or_null(spec)
    if isinstance(kind, list) and kind:
        return " | ".join(map(str, kind))
    if spec.get("oneOf"):
        return " | \n".join(map(_choice, spec["oneOf"]))
    if kind == "string" and spec.get("enum"):
        return '"' + '" | "'.join(map(str, spec["enum"])) + '"'
    if kind == "string":
        return "string" + _or_null(spec)
    if kind == "object" and spec.get("properties"):
        return _object_type(spec)
    simple = {"number": "number", "integer": "number", "boolean": "boolean", "object": "object"}
    return simple.get(kind, "any") if isinstance(kind, str) else "any"


def _element_type(items: Any) -> str:
    if not items:
        return "any"
    kind = items.get("type") if isinstance(items, Mapping) else None
    if kind in ("string", "number", "integer", "boolean"):
        return "number" if kind == "integer" else str(kind)
    text = _type(items)
    return "any" if text == "object | object" or len(text) > MAX_ARRAY_TYPE else text


def _object_type(spec: Mapping[str, Any]) -> str:
    required = spec.get("required") or []
    fields = [
        f"{name}{'' if name in required else '?'}: {_BEFORE_NESTED_TYPE}{_type(inner)}"
        for name, inner in spec["properties"].items()
    ]
    return "{\n" + ", ".join(fields) + "}"


def _choice(spec: Mapping[str, Any]) -> str:
    text = _type(spec)
    if spec.get("description"):
        text += f"// {spec['description']}"
    if "default" in spec:
        text += f"{_BEFORE_DEFAULT_OF_A_CHOICE}// default: {_json(spec['default'])}"
    return text


def _or_null(spec: Mapping[str, Any]) -> str:
    return " | null" if spec.get("nullable") else ""


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
