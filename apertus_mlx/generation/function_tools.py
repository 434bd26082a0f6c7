"""Python functions as tools: their definition for the model, and calls with what it wrote."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, get_type_hints

from apertus_mlx.errors import RejectedError, UsageError
from apertus_mlx.generation.argument_types import AnnotationReader, Read, Schema
from apertus_mlx.system.strict_json import parse_object
from apertus_mlx.text.given import Given

_NAME = re.compile("[a-zA-Z0-9_-]{1,64}")
_ARGUMENTS = re.compile(r"(Args|Arguments|Parameters):\s*")
_SECTION = re.compile(r"[A-Z][A-Za-z ]*:\s*")
_ARGUMENT = re.compile(r"(\w+)\s*(?:\([^)]*\))?:\s*(.*)")


def tool_schema(function: Callable[..., Any]) -> dict[str, Any]:
    """The definition of a function as OpenAI's API takes tools.

    Annotations give the schema of the arguments. The docstring's first paragraph describes the
    function; what Google's style writes below `Args:` describes the arguments.

    Raises:
        TypeError: it is no function.
        UsageError: it cannot be called with a JSON object, or has an annotation that has no form
            in JSON; the message names the function and the argument.
    """
    schema, _ = _read(function)
    text = inspect.getdoc(function) or ""
    described = _describe_arguments(text)
    for name, each in schema["properties"].items():
        if name in described and "description" not in each:
            schema["properties"][name] = {**each, "description": described[name]}
    found: dict[str, Any] = {"name": _name(function)}
    if words := _first_paragraph(text):
        found["description"] = words
    return {"type": "function", "function": {**found, "parameters": schema}}


def call_function(function: Callable[..., Any], arguments: str) -> str:
    """Call a function with arguments in JSON; returns its result, in JSON if it is no text.

    Args:
        function: one that `tool_schema` takes.
        arguments: an object in JSON. Its values become what the annotations say.

    Raises:
        UsageError: it is no such object, or the result has no form in JSON. The message names the
            argument.
        Exception: what the function raises.
    """
    _, read = _read(function)
    try:
        given = parse_object(arguments.encode("utf-8", "surrogatepass"), "arguments")
    except RejectedError as error:
        raise UsageError(str(error)) from None
    return result_text(function(**read(given, "")), _name(function))


def result_text(result: Any, name: str) -> str:
    """What a model is told of a result: a text as it is, else JSON.

    Raises:
        UsageError: it has no form in JSON, or holds half a surrogate pair, which is no text.
    """
    try:
        text = result
        if not isinstance(result, str):
            text = json.dumps(result, ensure_ascii=False, allow_nan=False, default=_plain)
    except (RecursionError, TypeError, ValueError) as error:
        raise UsageError(f"{name}: its result has no form in JSON ({error})") from None
    return Given(text, f"{name}: its result").text()


def _read(function: Callable[..., Any]) -> tuple[Schema, Read]:
    """The schema of a function's arguments, and what reads them."""
    name = _name(function)
    if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
        raise UsageError(f"{name}: is async; a tool is called and has to return its result")
    try:
        parameters = inspect.signature(function).parameters
        annotations = get_type_hints(inspect.unwrap(function), include_extras=True)
    except (NameError, TypeError, ValueError) as error:
        raise UsageError(f"{name}: its signature cannot be read ({error})") from None
    hints, required = {}, []
    for key, parameter in parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            stars = "*" if parameter.kind is parameter.VAR_POSITIONAL else "**"
            raise UsageError(
                f"{name}: {stars}{key}: a tool's arguments all have names of their own"
            )
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise UsageError(f"{name}: {key}: is positional only; a tool is called by names")
        if key not in annotations:
            raise UsageError(f"{name}: {key}: has no annotation")
        hints[key] = annotations[key]
        if parameter.default is parameter.empty:
            required.append(key)
    reader = AnnotationReader()
    schema, read = reader.fields(hints, required, f"{name}: ")
    for key, parameter in parameters.items():
        if key in required:
            continue
        try:
            default = json.loads(result_text([parameter.default], name))[0]
        except UsageError:
            continue  # its own text would tell the model nothing
        schema["properties"][key] = {**schema["properties"][key], "default": default}
    if reader.definitions:
        schema["$defs"] = reader.definitions
    return schema, read


def _name(function: Callable[..., Any]) -> str:
    if not callable(function) or isinstance(function, type):
        raise TypeError(f"a tool is a function, not {function!r:.60}")
    name = getattr(function, "__name__", None)
    if not isinstance(name, str):
        raise UsageError(f"{function!r:.60}: has no name; a tool needs one")
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{name[:64]}: a tool's name has 1 to 64 of the characters a-z A-Z 0-9 _ -"
        )
    return name


def _first_paragraph(text: str) -> str:
    lines: list[str] = []
    for line in text.strip().splitlines():
        if not line.strip() or _SECTION.fullmatch(line):
            break
        lines.append(line.strip())
    return " ".join(lines)


def _describe_arguments(text: str) -> dict[str, str]:
    """What a docstring in Google's style says of each argument."""
    found: dict[str, list[str]] = {}
    inside, depth, words = False, 0, []
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip())
        if not line.strip():
            continue
        if not indent:
            inside, depth = _ARGUMENTS.fullmatch(line) is not None, 0
        elif inside:
            depth = depth or indent
            if indent <= depth and (entry := _ARGUMENT.match(line.strip())):
                words = found.setdefault(entry[1], [])
                words.append(entry[2])
            else:
                words.append(line.strip())
    return {name: " ".join(words).strip() for name, words in found.items()}


def _plain(value: Any) -> Any:
    """A value of a result that `json` does not know, as one that it does."""
    if isinstance(value, Enum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return dict(value)
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    raise TypeError(f"{type(value).__name__} is none of its types")
