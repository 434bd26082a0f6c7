"""What an annotation says of JSON: the schema of its values, and how one becomes Python's."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    NotRequired,
    Required,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from apertus_mlx.errors import UsageError

Schema = dict[str, Any]
# Takes a value of JSON and its place, which begins what is said of a wrong value.
Read = Callable[[Any, str], Any]
_KINDS: dict[type, tuple[str, str]] = {
    str: ("string", "a text"),
    bool: ("boolean", "true or false"),
    int: ("integer", "an integer"),
    float: ("number", "a number"),
    NoneType: ("null", "null"),
}


class AnnotationReader:
    """Reads the annotations of one function.

    Attributes:
        definitions: what schemas of pydantic refer to as `#/$defs/NAME`.
    """

    def __init__(self) -> None:
        self.definitions: Schema = {}
        self._within: list[type] = []

    def read(self, hint: Any, place: str) -> tuple[Schema, Read]:
        """The schema of an annotation, and what makes its values.

        Raises:
            UsageError: a type that has no form in JSON here; the message begins with `place`.
        """
        if get_origin(hint) is Annotated:
            return self._annotated(hint, place)
        if hint is Any or hint is object:
            return {}, lambda value, _: value
        if hint is None or hint in _KINDS:
            return _plain(NoneType if hint is None else hint)
        origin, inner = get_origin(hint) or hint, get_args(hint)
        if origin in (Union, UnionType):
            return self._union([self.read(each, place) for each in inner])
        if origin is Literal:
            return _choice([(each, each) for each in inner], place)
        if origin in (list, Sequence):
            return self._list(inner[0] if inner else Any, place)
        if origin in (dict, Mapping):
            return self._dict(inner or (str, Any), place)
        if isinstance(hint, type):
            return self._class(hint, place)
        raise _unknown(hint, place)

    def fields(
        self, hints: Mapping[str, Any], required: Sequence[str], place: str
    ) -> tuple[Schema, Read]:
        """The schema of an object with these keys and no other, and what reads it as a `dict`."""
        found = {name: self.read(hint, f"{place}{name}") for name, hint in hints.items()}
        schema: Schema = {
            "type": "object",
            "properties": {name: schema for name, (schema, _) in found.items()},
            "required": list(required),
            "additionalProperties": False,
        }

        def read(value: Any, where: str) -> dict[str, Any]:
            if not isinstance(value, dict):
                raise _wrong(value, where, "an object")
            for name in value:
                if name not in found:
                    known = ", ".join(found) or "there are none"
                    raise UsageError(f"{where}{name[:60]}: is unknown; expected {known}")
            for name in required:
                if name not in value:
                    raise UsageError(f"{where}{name}: is missing")
            return {name: found[name][1](each, f"{where}{name}") for name, each in value.items()}

        return schema, read

    def _annotated(self, hint: Any, place: str) -> tuple[Schema, Read]:
        inner, *notes = get_args(hint)
        schema, read = self.read(inner, place)
        for note in notes:
            if not isinstance(note, str):
                raise UsageError(f"{place}: Annotated takes a description, a text, and no {note!r}")
            schema = {**schema, "description": note}
        return schema, read

    def _union(self, parts: Sequence[tuple[Schema, Read]]) -> tuple[Schema, Read]:
        schemas = [schema for schema, _ in parts]
        kinds = [schema.get("type") for schema in schemas]
        # An integer is a number too, but stays an integer where the union has both.
        readers = [read for schema, read in parts if schema != {"type": "number"}]
        readers += [read for schema, read in parts if schema == {"type": "number"}]

        def read(value: Any, place: str) -> Any:
            errors = []
            for each in readers:
                try:
                    return each(value, place)
                except UsageError as error:
                    errors.append(str(error).removeprefix(f"{place}: "))
            raise UsageError(f"{place}: {'; or '.join(dict.fromkeys(errors))}")

        if all(set(schema) == {"type"} and isinstance(schema["type"], str) for schema in schemas):
            return {"type": list(dict.fromkeys(kinds))}, read
        return {"anyOf": schemas}, read

    def _list(self, inner: Any, place: str) -> tuple[Schema, Read]:
        items, read_item = self.read(inner, place)

        def read(value: Any, where: str) -> list[Any]:
            if not isinstance(value, list):
                raise _wrong(value, where, "a list")
            return [read_item(each, f"{where}[{index}]") for index, each in enumerate(value)]

        return {"type": "array", "items": items}, read

    def _dict(self, inner: Sequence[Any], place: str) -> tuple[Schema, Read]:
        if inner[0] is not str:
            raise UsageError(
                f"{place}: the keys of a dict are texts in JSON; annotate dict[str, …]"
            )
        values, read_value = self.read(inner[1], place)

        def read(value: Any, where: str) -> dict[str, Any]:
            if not isinstance(value, dict):
                raise _wrong(value, where, "an object")
            return {key: read_value(each, f"{where}.{key}") for key, each in value.items()}

        return {"type": "object", "additionalProperties": values or True}, read

    def _class(self, hint: type, place: str) -> tuple[Schema, Read]:
        if hint in self._within:
            raise UsageError(f"{place}: {hint.__name__} holds itself, which is not supported")
        self._within.append(hint)
        try:
            if issubclass(hint, Enum):
                return _choice([(each.value, each) for each in hint], place)
            if dataclasses.is_dataclass(hint):
                return self._dataclass(hint, place)
            # The one of typing_extensions is no TypedDict to `is_typeddict`.
            if issubclass(hint, dict) and hasattr(hint, "__required_keys__"):
                return self._typed_dict(hint, place)
            if hasattr(hint, "model_json_schema"):
                return self._pydantic(hint, place)
        finally:
            self._within.pop()
        raise _unknown(hint, place)

    def _dataclass(self, hint: Any, place: str) -> tuple[Schema, Read]:
        hints = _hints(hint, place)
        fields = [field for field in dataclasses.fields(hint) if field.init]
        missing = dataclasses.MISSING
        required = [f.name for f in fields if f.default is missing and f.default_factory is missing]
        schema, read_fields = self.fields(
            {f.name: hints[f.name] for f in fields}, required, f"{place}."
        )

        def read(value: Any, where: str) -> Any:
            try:
                return hint(**read_fields(value, f"{where}."))
            except (TypeError, ValueError) as error:
                raise UsageError(f"{where}: {error}") from error

        return schema, read

    def _typed_dict(self, hint: Any, place: str) -> tuple[Schema, Read]:
        hints = _hints(hint, place)
        # Python does not see what annotations that are texts say of a key.
        required = [
            name
            for name, each in hints.items()
            if get_origin(each) is Required
            or (name in hint.__required_keys__ and get_origin(each) is not NotRequired)
        ]
        bare = {
            name: get_args(each)[0] if get_origin(each) in (Required, NotRequired) else each
            for name, each in hints.items()
        }
        schema, read_fields = self.fields(bare, required, f"{place}.")
        return schema, lambda value, where: read_fields(value, f"{where}.")

    def _pydantic(self, hint: Any, place: str) -> tuple[Schema, Read]:
        schema = hint.model_json_schema()
        for name, each in schema.pop("$defs", {}).items():
            if self.definitions.setdefault(name, each) != each:
                raise UsageError(f"{place}: another class has the name {name}, too")

        def read(value: Any, where: str) -> Any:
            try:
                return hint.model_validate(value)
            except ValueError as error:  # one of pydantic, with a line for each place
                raise UsageError(f"{where}: {' '.join(str(error).split())}") from error

        return schema, read


def _plain(kind: type) -> tuple[Schema, Read]:
    name, words = _KINDS[kind]

    def read(value: Any, place: str) -> Any:
        if kind is int and isinstance(value, float) and value.is_integer():
            return int(value)  # a schema counts 2.0 among the integers
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return _float(value, place)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise _wrong(value, place, words)
        return value

    return {"type": name}, read


def _float(value: int, place: str) -> float:
    try:
        return float(value)
    except OverflowError:
        raise UsageError(f"{place}: is too large a number") from None


def _choice(members: Sequence[tuple[Any, Any]], place: str) -> tuple[Schema, Read]:
    """One of a few values of JSON, each with what it stands for."""
    values = [value for value, _ in members]
    kinds = {type(value) for value in values}
    infinite = any(isinstance(value, float) and not math.isfinite(value) for value in values)
    if not kinds <= set(_KINDS) or infinite:
        raise UsageError(f"{place}: a choice among what is no text, number, boolean or None")
    schema: Schema = {"enum": values}
    if len(kinds) == 1:
        schema = {"type": _KINDS[kinds.pop()][0], **schema}

    def read(value: Any, where: str) -> Any:
        for known, member in members:
            # 1, 1.0 and true are equal in Python.
            if value == known and isinstance(value, bool) == isinstance(known, bool):
                return member
        raise _wrong(value, where, f"one of {', '.join(map(repr, values))}")

    return schema, read


def _hints(hint: type, place: str) -> dict[str, Any]:
    try:
        return get_type_hints(hint, include_extras=True)
    except NameError as error:
        raise UsageError(f"{place}: {hint.__name__}: {error}") from None


def _wrong(value: Any, place: str, expected: str) -> UsageError:
    return UsageError(f"{place}: expected {expected}, not {_shown(value)}")


def _shown(value: Any) -> str:
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else repr(value)[:60]


def _unknown(hint: Any, place: str) -> UsageError:
    shown = hint.__name__ if isinstance(hint, type) else str(hint)
    return UsageError(
        f"{place}: {shown[:80]} has no form in JSON here; take str, int, float, bool, None, list, "
        "dict, Literal, an Enum, a dataclass, a TypedDict or a pydantic model"
    )
