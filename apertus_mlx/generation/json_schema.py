"""A JSON schema that answers shall follow: read from what a caller gives, and checked.

The engine that enforces it ignores keywords that it does not know. Here every keyword is known to
be enforced exactly, known to say nothing about values, or refused by name and place.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import unquote

from apertus_mlx.errors import NotFoundError, RejectedError, UsageError
from apertus_mlx.system.model_files import exists, read_own_file
from apertus_mlx.system.strict_json import parse_object

MAX_BYTES, MAX_DEPTH, MAX_SUBSCHEMAS = 2**20, 64, 5000
# What the engine takes long for: automata for divisors, pairs of patterns, products of choices.
MAX_DIVISOR, MAX_PATTERNS, MAX_COMBINATIONS = 10_000, 32, 100

ANNOTATIONS = frozenset(
    {
        "title", "description", "default", "example", "examples", "deprecated", "readOnly",
        "writeOnly", "$comment", "discriminator",
    }
)  # fmt: skip
ENFORCED = frozenset(
    {
        "type", "enum", "const", "anyOf", "oneOf", "allOf", "$ref", "$defs", "definitions",
        "properties", "required", "additionalProperties", "patternProperties", "minProperties",
        "maxProperties", "items", "prefixItems", "minItems", "maxItems", "minLength", "maxLength",
        "pattern", "format", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum",
        "multipleOf",
    }
)  # fmt: skip
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems", "enum", "required")
_OBJECTS = ("properties", "patternProperties", "$defs", "definitions")
_SHAPES: tuple[tuple[str, type, str], ...] = (
    *((keyword, list, "a list") for keyword in _LISTS),
    *((keyword, dict, "an object") for keyword in _OBJECTS),
)
FORMATS = frozenset(
    {"date", "time", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"}
)
_DIALECT = re.compile(r"https?://json-schema\.org/(draft/20(19-09|20-12)|draft-0[67])/schema#?")
# A backslash and what both the engine and ECMA-262 understand alike; or anything else.
_PATTERN_PART = re.compile(r"\\(?:x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|[dDwWsSnrtfv]|[^\w\s])|[^\\]")
# Characters that JSON can only write as \u00XX, which answers may not contain: the engine would
# take `\u0061` for another key than `a`.
_CONTROL = re.compile("[\x00-\x07\x0b\x0e-\x1f\x7f\ud800-\udfff]")


def read_schema(given: Path | str | Mapping[str, Any] | type, option: str = "--schema") -> str:
    """Return the checked JSON text of a schema: a file, a text, a dictionary or a pydantic class.

    The keys stay in their order, which is that of the answer's.

    Raises:
        NotFoundError: there is no such file.
        UsageError: it is no JSON, too large, or has a keyword that cannot be enforced; the message
            begins with `option` and names the place.
    """
    if isinstance(given, type):
        make = getattr(given, "model_json_schema", None)
        if make is None:
            raise UsageError(f"{option}: {given.__name__} is no pydantic model")
        given = make()
    name = option
    if isinstance(given, Path):
        name = f"{option} {given}"
        if not exists(given):
            raise NotFoundError(f"{name}: no such file")
        try:
            data = read_own_file(given, MAX_BYTES)
        except RejectedError as error:
            raise UsageError(f"{option}: {error}") from None
    else:
        try:
            text = given if isinstance(given, str) else json.dumps(given, allow_nan=False)
            data = text.encode()
        except (RecursionError, TypeError, ValueError) as error:
            raise UsageError(f"{option}: is no JSON ({error})") from None
    if len(data) > MAX_BYTES:
        raise UsageError(f"{option}: is larger than {MAX_BYTES:,} bytes")
    return _checked(data, option, name)


@functools.lru_cache(maxsize=32)
def _checked(data: bytes, option: str, name: str) -> str:
    try:
        schema = parse_object(data, name)
    except RejectedError as error:
        raise UsageError(str(error)) from None
    _Check(schema, option).run()
    return json.dumps({k: v for k, v in schema.items() if k not in ("$schema", "$id")})


class _Check:
    """One pass over a schema and all that its references name."""

    def __init__(self, root: dict[str, Any], option: str) -> None:
        self._root = root
        self._option = option
        self._seen: set[int] = set()
        self._divisors = 1
        self._counts: dict[int, int] = {}

    def run(self) -> None:
        self._depth(self._root)
        dialect = self._root.get("$schema")
        if dialect is not None and not (isinstance(dialect, str) and _DIALECT.fullmatch(dialect)):
            self._refuse("#", f"$schema {dialect!r:.60} is not supported; use draft 2020-12")
        self._modern = dialect is None or "2020-12" in dialect
        try:
            self._schema(self._root, "#")
        except RecursionError:
            self._refuse("#", "its references name each other too deeply")

    def _refuse(self, place: str, reason: str) -> NoReturn:
        raise UsageError(f"{self._option}: at {place[:200]}: {reason}")

    def _depth(self, root: object) -> None:
        level = [root]
        for _ in range(MAX_DEPTH):
            level = [inner for value in level for inner in _inside(value)]
        if level:
            self._refuse("#", f"is nested more than {MAX_DEPTH} levels deep")

    def _schema(self, schema: Any, place: str) -> None:
        if isinstance(schema, bool) or id(schema) in self._seen:
            return
        if not isinstance(schema, dict):
            self._refuse(place, f"expected a schema, found {type(schema).__name__}")
        self._seen.add(id(schema))
        if len(self._seen) > MAX_SUBSCHEMAS:
            self._refuse("#", f"has more than {MAX_SUBSCHEMAS} schemas in it")
        for keyword, kind, words in _SHAPES:
            if not isinstance(schema.get(keyword, kind()), kind):
                self._refuse(place, f"{keyword}: expected {words}")
        for keyword, value in schema.items():
            self._keyword(schema, keyword, value, place)
        self._values(schema, place)
        for inner, where in self._inner(schema, place):
            self._schema(inner, where)
        self._combinations(schema, place)

    def _keyword(self, schema: dict[str, Any], keyword: str, value: Any, place: str) -> None:
        if keyword in ("$schema", "$id") and place == "#":
            return
        vendor = keyword.startswith("x-") and keyword != "x-guidance"
        if keyword not in ENFORCED and keyword not in ANNOTATIONS and not vendor:
            self._refuse(place, f"{keyword[:60]} is not supported")
        if keyword == "$ref":
            self._target(value, place)
        elif keyword == "items" and isinstance(value, list):
            self._refuse(place, "items as a list is not supported; use prefixItems")
        elif keyword == "prefixItems" and not self._modern:
            self._refuse(place, "prefixItems needs draft 2020-12; leave out $schema")
        elif keyword == "format" and not (isinstance(value, str) and value in FORMATS):
            known = ", ".join(sorted(FORMATS))
            self._refuse(place, f"format {value!r:.60} is not supported; {known} are")
        elif keyword == "pattern":
            self._pattern(value, place)
        elif keyword == "patternProperties":
            for pattern in value:
                self._pattern(pattern, place)
            if len(value) > MAX_PATTERNS:
                self._refuse(place, f"patternProperties has more than {MAX_PATTERNS} patterns")
        elif keyword == "multipleOf":
            self._multiple(schema, value, place)
        elif keyword in ("exclusiveMinimum", "exclusiveMaximum"):
            if isinstance(value, bool):
                self._refuse(place, f"{keyword}: expected a number")
        elif keyword == "minProperties" and not (
            value in (0, 1) or value == len({str(name) for name in schema.get("required", ())})
        ):
            # A key that the schema does not name may come twice, and then counts once.
            self._refuse(place, f"minProperties {value!r:.20} is not supported; 0 and 1 are")

    def _values(self, schema: dict[str, Any], place: str) -> None:
        """Refuse texts that no answer can spell."""
        named: list[Any] = [schema.get("const"), schema.get("enum"), schema.get("required")]
        named += list(schema.get("properties", {}))
        if any(_CONTROL.search(text) for value in named for text in _texts(value)):
            self._refuse(place, "control characters in values and names are not supported")

    def _pattern(self, pattern: Any, place: str) -> None:
        if not isinstance(pattern, str):
            self._refuse(place, "pattern: expected a text")
        # What is meant otherwise in ECMA-262, which schemas follow, than in the engine.
        other = re.search(r"\(\?(?!:)|&&|--|~~|\[[^\]]*\[|\[\^?\]", pattern)
        rest = other.group() if other else _PATTERN_PART.sub("", pattern)
        if not rest:
            try:
                re.compile(pattern)
            except (re.error, OverflowError, RecursionError):
                rest = pattern
        if rest or _CONTROL.search(pattern):
            self._refuse(place, f"pattern {pattern!r:.60}: {rest!r:.20} is not supported")

    def _multiple(self, schema: dict[str, Any], value: Any, place: str) -> None:
        if schema.get("type") != "integer" or type(value) is not int or value < 1:
            self._refuse(place, "multipleOf is supported for type integer alone, as an integer")
        self._divisors = math.lcm(self._divisors, value)
        if self._divisors > MAX_DIVISOR:
            self._refuse(
                place,
                f"multipleOf: all together must have a common multiple up to {MAX_DIVISOR:,}",
            )

    def _target(self, reference: Any, place: str) -> Any:
        if not isinstance(reference, str) or not (reference == "#" or reference[:2] == "#/"):
            self._refuse(place, f"$ref {reference!r:.60} is not supported; #/... within it is")
        target: Any = self._root
        for part in unquote(reference).split("/")[1:]:
            name = part.replace("~1", "/").replace("~0", "~")
            if isinstance(target, list) and name.isdecimal() and int(name) < len(target):
                target = target[int(name)]
            elif isinstance(target, dict) and name in target:
                target = target[name]
            else:
                self._refuse(place, f"$ref {reference!r:.60} names nothing in the schema")
        return target

    def _inner(self, schema: dict[str, Any], place: str) -> Iterator[tuple[Any, str]]:
        """The schemas within a schema, and the one that it refers to, with their places."""
        for keyword in ("anyOf", "oneOf", "allOf", "prefixItems"):
            for index, each in enumerate(schema.get(keyword, [])):
                yield each, f"{place}/{keyword}/{index}"
        for keyword in ("properties", "patternProperties", "$defs", "definitions"):
            for name, each in schema.get(keyword, {}).items():
                yield each, f"{place}/{keyword}/{name[:60]}"
        for keyword in ("items", "additionalProperties"):
            if keyword in schema:
                yield schema[keyword], f"{place}/{keyword}"
        if "$ref" in schema:
            yield self._target(schema["$ref"], place), schema["$ref"]

    def _combinations(self, schema: Any, place: str) -> int:
        """How many alternatives the engine will merge this schema into."""
        if not isinstance(schema, dict):
            return 1
        if id(schema) not in self._counts:
            self._counts[id(schema)] = 1  # for a reference to itself
            parts = [self._combinations(each, place) for each in schema.get("allOf", [])]
            for keyword in ("anyOf", "oneOf"):
                parts.append(
                    sum(self._combinations(each, place) for each in schema.get(keyword, [])) or 1
                )
            if "$ref" in schema:
                parts.append(self._combinations(self._target(schema["$ref"], place), place))
            count = math.prod(parts)
            if count > max(MAX_COMBINATIONS, *parts):
                self._refuse(place, f"allOf combines more than {MAX_COMBINATIONS} choices")
            self._counts[id(schema)] = count
        return self._counts[id(schema)]


def _inside(value: object) -> list[object]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from value
    for inner in _inside(value):
        yield from _texts(inner)
