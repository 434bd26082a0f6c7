"""Random JSON schemas that answers can follow, and random models to give the answers."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import jsonschema

WORDS = ("a", "b", "name", "Zürich", "two words", 'q"uote', "back\\slash", "new\nline", "🏔")
PATTERNS = (
    "^[a-c]{1,4}$",
    "^\\d{2}-\\d{2}$",
    "^(foo|ba[rz])+$",
    "x.{0,5}$",
    '^[^\\s"]{0,6}$',
    "^\\w+ é$",
)
FORMATS = (
    "date",
    "time",
    "date-time",
    "ipv4",
    "ipv6",
    "uuid",
    "email",
    "duration",
    "hostname",
    "uri",
)
SCALARS = (None, True, False, 0, 1, -7, 2.5, 1e20, "", *WORDS)
# These the jsonschema package checks without further packages.
CHECKED_FORMATS = jsonschema.FormatChecker(("ipv4", "ipv6", "uuid", "email"))


class SchemaMaker:
    """Draws schemas that use every keyword that is supported."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self._recursive = False

    def make(self) -> dict[str, Any]:
        self._recursive = self.random.random() < 0.15
        schema = self.schema(3)
        if self._recursive:
            schema["$defs"] = {"again": self.schema(1)}
        return schema

    def schema(self, depth: int) -> dict[str, Any]:
        kinds: list[Callable[[int], dict[str, Any]]] = [
            self._string, self._number, self._integer, self._enum, self._simple,
        ]  # fmt: skip
        if depth > 0:
            kinds += [self._object] * 4 + [self._array] * 2 + [self._choice, self._all, self._mixed]
        found = self.random.choice(kinds)(depth)
        if self.random.random() < 0.2:
            found |= {"title": "T", "description": "d", "examples": [1], "default": None}
        return found

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def _inner(self, depth: int) -> Any:
        if self._recursive and self.chance(0.15):
            return {"$ref": "#/$defs/again"}
        if self.chance(0.02):
            return True
        return self.schema(depth - 1)

    def _simple(self, depth: int) -> dict[str, Any]:
        return {"type": self.random.choice(["boolean", "null", "integer", "number"])}

    def _string(self, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {"type": "string"}
        choice = self.random.randrange(5)
        if choice == 0:
            found["pattern"] = self.random.choice(PATTERNS)
        elif choice == 1:
            found["format"] = self.random.choice(FORMATS)
        elif choice == 2:
            found["minLength"] = self.random.randrange(4)
            found["maxLength"] = found["minLength"] + self.random.randrange(9)
        elif choice == 3 or self.chance(0.8):  # most models do not end a text by themselves
            found["maxLength"] = self.random.randrange(20)
        return found

    def _integer(self, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {"type": "integer"}
        if self.chance(0.3):
            found["multipleOf"] = self.random.choice([1, 2, 3, 5, 10])
        return found | self._bounds(lambda: self.random.randrange(-300, 300))

    def _number(self, depth: int) -> dict[str, Any]:
        bounds = self._bounds(lambda: round(self.random.uniform(-9, 9), self.random.randrange(4)))
        return {"type": "number"} | bounds

    def _bounds(self, draw: Callable[[], float]) -> dict[str, Any]:
        low, high = sorted((draw(), draw()))
        found: dict[str, Any] = {}
        if self.chance(0.5):
            found[self.random.choice(["minimum", "exclusiveMinimum"])] = low
        if self.chance(0.5):
            found[self.random.choice(["maximum", "exclusiveMaximum"])] = high + 20
        return found

    def _enum(self, depth: int) -> dict[str, Any]:
        values: list[Any] = self.random.sample(SCALARS, self.random.randint(1, 5))
        if self.chance(0.3):
            values.append({"k": [1, {"b": None}], "z": []})
        return {"const": values[0]} if self.chance(0.3) else {"enum": values}

    def _array(self, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {"type": "array"}
        if self.chance(0.8):
            found["items"] = self._inner(depth)
        if self.chance(0.3):
            found["prefixItems"] = [self._inner(depth) for _ in range(self.random.randint(1, 3))]
        if self.chance(0.4):
            found["minItems"] = self.random.randrange(3)
        if self.chance(0.6):
            found["maxItems"] = found.get("minItems", 0) + self.random.randrange(4)
        return found

    def _object(self, depth: int) -> dict[str, Any]:
        names = self.random.sample(WORDS, self.random.randrange(5))
        found: dict[str, Any] = {
            "type": "object",
            "properties": {name: self._inner(depth) for name in names},
            "required": [name for name in names if self.chance(0.6)],
        }
        if self.chance(0.85):
            found["additionalProperties"] = False
        elif self.chance(0.7):
            found["additionalProperties"] = self._inner(depth)
        if self.chance(0.15):
            found["patternProperties"] = {"^x_[a-z]{1,3}$": self._inner(depth)}
        if self.chance(0.1) and len(found["required"]) == len(names):
            found["minProperties"] = max(1, len(names))
            found["maxProperties"] = len(names) + 1
        return found

    def _choice(self, depth: int) -> dict[str, Any]:
        if self.chance(0.5):
            return {"anyOf": [self._inner(depth) for _ in range(self.random.randint(1, 3))]}
        return {
            "oneOf": [
                {
                    "type": "object",
                    "properties": {"kind": {"const": kind}, "value": self._inner(depth)},
                    "required": ["kind", "value"],
                    "additionalProperties": False,
                }
                for kind in ("cat", "dog", "ü")[: self.random.randint(1, 3)]
            ],
            "discriminator": {"propertyName": "kind"},
        }

    def _all(self, depth: int) -> dict[str, Any]:
        first, second = self._object(depth), self._object(depth)
        for part in (first, second):
            part.pop("additionalProperties", None)
        return {"allOf": [first, {"properties": second["properties"]}, {"required": ["name"]}]}

    def _mixed(self, depth: int) -> dict[str, Any]:
        return {"type": ["string", "null", "integer"], "maxLength": 5, "minimum": 3}


def faults(schema: dict[str, Any], text: str) -> list[str]:
    """What the jsonschema package finds wrong with an answer."""
    validator = jsonschema.Draft202012Validator(schema, format_checker=CHECKED_FORMATS)
    return [error.message for error in validator.iter_errors(json.loads(text))]
