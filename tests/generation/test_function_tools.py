"""Functions as tools: against pydantic's schemas and values, and transformers' schemas."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated, Any, Literal, NotRequired, Optional, Required, TypedDict, Union

import jsonschema
import pytest

from apertus_mlx.errors import UsageError
from apertus_mlx.generation.argument_types import AnnotationReader
from apertus_mlx.generation.function_tools import call_function, result_text, tool_schema

typing_extensions: Any = pytest.importorskip("typing_extensions")
pydantic: Any = pytest.importorskip("pydantic")


class Unit(Enum):
    CELSIUS = "C"
    FAHRENHEIT = "F"


class Level(Enum):
    LOW = 2
    HIGH = -7


@dataclass
class Place:
    city: str
    height: float | None = None
    names: list[str] = field(default_factory=list)


class Period(typing_extensions.TypedDict):
    days: int
    unit: NotRequired[Literal["h", "min"]]


class Person(pydantic.BaseModel):  # type: ignore[misc]
    name: str
    home: Place


HINTS: list[Any] = [
    str, int, float, bool, None, Any, list, list[int], Sequence[str], dict[str, float], dict,
    Mapping[str, list[bool]], Literal["a", "b"], Literal[1, "a", None, True], Unit, Level,
    Optional[str], int | str, Union[float, int, None],  # noqa: UP007, UP045
    list[int] | None, Unit | None, Place,
    list[Place], Period, Person, dict[str, Place | None], Annotated[int, "how many"],
]  # fmt: skip
VALUES: list[Any] = [
    None, True, False, 0, 1, 2, -7, 10**30, 0.5, "", "a", "C", "é\n", [], [1], ["a"], [None],
    [[True]], {}, {"a": 1}, {"a": [True]}, {"city": "Bern"}, [{"city": "Bern"}], {"days": 3},
    {"city": "Bern", "height": 2, "names": ["B"]}, {"city": 3}, {"city": "Bern", "height": "low"},
    {"days": 3, "unit": "h"}, {"days": 3, "unit": "s"}, {"unit": "h"}, {"a": {"city": "Bern"}},
    {"name": "Ada", "home": {"city": "Bern"}}, {"name": "Ada", "home": 3}, {"a": None},
]  # fmt: skip


@pytest.mark.parametrize("hint", HINTS, ids=str)
def test_types_are_those_of_pydantic(hint: Any) -> None:
    """What the schema takes, what reading takes, and what it makes of it."""
    adapter = pydantic.TypeAdapter(hint)
    reader = AnnotationReader()
    schema, read = reader.read(hint, "x")
    schema = {**schema, "$defs": reader.definitions}
    mine, its = (jsonschema.Draft202012Validator(one) for one in (schema, adapter.json_schema()))
    taken = 0
    for value in VALUES:
        assert mine.is_valid(value) == its.is_valid(value), value
        try:
            expected = adapter.validate_json(json.dumps(value), strict=True)
        except pydantic.ValidationError:
            with pytest.raises(UsageError, match=r"^x"):
                read(value, "x")
            continue
        found = read(value, "x")
        assert (found, type(found)) == (expected, type(expected)), value
        taken += 1
    assert taken


def weather(
    city: str,
    days: int,
    unit: Literal["C", "F"],
    level: float = 0.5,
    exact: bool = False,
    tags: list[str] = [],  # noqa: B006
    limits: dict[str, int] = {},  # noqa: B006
) -> str:
    """
    Get the weather of a city.

    Args:
        city: The city's name,
            in any language.
        days: How many days.
        unit (str): Of temperatures.
        level: How sure it is: from 0 to 1.
        exact: Whether to round.
        tags: What to look for.
        limits: Bounds.

    Returns:
        What it is like.
    """
    return f"{city} {days} {unit} {level} {exact} {tags} {limits}"


# What `transformers.utils.get_json_schema` of 5.24.0 makes of it, but for the result.
WEATHER = {
    "name": "weather",
    "description": "Get the weather of a city.",
    "parameters": {
        "type": "object",
        "properties": {
            "city": {"type": "string", "description": "The city's name, in any language."},
            "days": {"type": "integer", "description": "How many days."},
            "unit": {"type": "string", "enum": ["C", "F"], "description": "Of temperatures."},
            "level": {"type": "number", "description": "How sure it is: from 0 to 1."},
            "exact": {"type": "boolean", "description": "Whether to round."},
            "tags": {
                "type": "array", "items": {"type": "string"}, "description": "What to look for.",
            },
            "limits": {
                "type": "object", "additionalProperties": {"type": "integer"},
                "description": "Bounds.",
            },
        },
        "required": ["city", "days", "unit"],
    },
}  # fmt: skip


@pytest.mark.nightly  # importing transformers takes longest
def test_transformers_says_what_is_recorded() -> None:
    utils = pytest.importorskip("transformers.utils")
    expected = utils.get_json_schema(weather)
    del expected["function"]["return"]
    assert expected == {"type": "function", "function": WEATHER}


def test_a_definition_is_that_of_transformers() -> None:
    """But for its defaults, and that no other argument may come."""
    found = tool_schema(weather)
    parameters = found["function"]["parameters"]
    assert parameters.pop("additionalProperties") is False
    defaults = {k: v.pop("default") for k, v in parameters["properties"].items() if "default" in v}
    assert defaults == {"level": 0.5, "exact": False, "tags": [], "limits": {}}
    assert found == {"type": "function", "function": WEATHER}


def test_arguments_are_those_of_pydantic() -> None:
    def of(place: Place, unit: Unit = Unit.CELSIUS, *, person: Person | None = None) -> None:
        """Do."""

    of.__annotations__ = {"place": Place, "unit": Unit, "person": Person | None}
    found = tool_schema(of)["function"]["parameters"]
    expected = pydantic.TypeAdapter(of).json_schema()
    assert found["required"] == expected["required"] == ["place"]
    assert found["additionalProperties"] is expected["additionalProperties"] is False
    assert found["properties"]["unit"]["default"] == expected["properties"]["unit"]["default"]
    assert found["properties"]["person"]["default"] is None
    mine, its = (jsonschema.Draft202012Validator(one) for one in (found, expected))
    for value in (
        {},
        {"place": {"city": "Bern"}},
        {"place": {"city": "Bern"}, "unit": "K"},
        {"place": {"city": "Bern"}, "person": {"name": "Ada", "home": {"city": "Zug"}}},
        {"place": {"city": "Bern"}, "person": {"name": "Ada", "home": {}}},
        {"place": {"city": "Bern"}, "other": 1},
    ):
        assert mine.is_valid(value) == its.is_valid(value), value


class Pair(TypedDict, total=False):
    left: Required[int]
    right: str


def test_a_typed_dict_of_the_standard_library() -> None:
    schema, read = AnnotationReader().read(Pair, "x")
    assert schema["required"] == ["left"]
    assert read({"left": 1}, "x") == {"left": 1}
    with pytest.raises(UsageError, match=r"^x\.left: is missing"):
        read({"right": "a"}, "x")


def test_a_call() -> None:
    def look(place: Place, units: list[Unit], note: str | None = None) -> Any:
        assert isinstance(place, Place) and units == [Unit.CELSIUS, Unit.FAHRENHEIT]
        return {"place": place, "unit": units[0], "note": note}

    text = '{"place": {"city": "Zürich"}, "units": ["C", "F"]}'
    assert json.loads(call_function(look, text)) == {
        "place": {"city": "Zürich", "height": None, "names": []}, "unit": "C", "note": None,
    }  # fmt: skip
    text = '{"city": "Bern", "days": 2, "unit": "C"}'
    assert call_function(weather, text) == "Bern 2 C 0.5 False [] {}"

    class Shop:
        def price(self, item: str) -> float:
            return len(item) / 2

    assert call_function(Shop().price, '{"item": "tea"}') == "1.5"


def test_results_are_text() -> None:
    class Odd:
        pass

    assert result_text("plain", "f") == "plain"
    assert result_text("", "f") == ""
    for value in (None, True, 3, 0.5, [1, "é"], {"a": [None]}):
        assert json.loads(result_text(value, "f")) == value
    assert "é" in result_text(["é"], "f")
    assert json.loads(result_text(Person(name="Ada", home=Place("Bern")), "f"))["name"] == "Ada"
    circle: list[Any] = []
    circle.append(circle)
    for value in ({1, 2}, float("nan"), Odd(), Odd, circle):
        with pytest.raises(UsageError, match=r"^f: its result has no form in JSON"):
            result_text(value, "f")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("", r"^arguments: is empty"),
        ("{", r"^arguments: is not valid JSON"),
        ("[1]", r"^arguments: expected a JSON object"),
        ('{"city": "a", "city": "b"}', r"^arguments: .*duplicate key 'city'"),
        ("{}", r"^city: is missing$"),
        (
            '{"city": "a", "days": 1, "unit": "C", "wind": 1}',
            r"^wind: is unknown; expected city, d",
        ),
        ('{"city": 3, "days": 1, "unit": "C"}', r"^city: expected a text, not 3$"),
        ('{"city": "a", "days": "1", "unit": "C"}', r"^days: expected an integer, not '1'$"),
        ('{"city": "a", "days": true, "unit": "C"}', r"^days: expected an integer, not true$"),
        ('{"city": "a", "days": 1, "unit": "K"}', r"^unit: expected one of 'C', 'F', not 'K'$"),
        ('{"city": "a", "days": 1, "unit": "C", "tags": ["a", 1]}', r"^tags\[1\]: expected a text"),
        (
            '{"city": "a", "days": 1, "unit": "C", "limits": {"a": null}}',
            r"^limits\.a: .*not null$",
        ),
        ('{"city": "a", "days": 1, "unit": "C", "level": 1e999}', "arguments|level"),
    ],
)
def test_arguments_that_do_not_fit(arguments: str, words: str) -> None:
    if "1e999" in arguments:
        assert "inf" in call_function(weather, arguments)  # as Python reads such a number
        return
    with pytest.raises(UsageError, match=words):
        call_function(weather, arguments)


def positional(a: int, /) -> None: ...
def many(*a: int) -> None: ...
def named(**a: int) -> None: ...
def bare(a) -> None: ...  # type: ignore[no-untyped-def]
def foreign(a: complex) -> None: ...
def keys(a: dict[int, str]) -> None: ...
def pair(a: tuple[int, int]) -> None: ...
def inner(a: list[dict[str, set[int]]]) -> None: ...
def unknown(a: Nowhere) -> None: ...  # type: ignore[name-defined]  # noqa: F821
def noted(a: Annotated[int, pydantic.Field(gt=3)]) -> None: ...
async def later(a: int) -> None: ...
def größe(a: int) -> None: ...


@dataclass
class Tree:
    left: Tree | None = None


def tree(a: Tree) -> None: ...


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (positional, r"^positional: a: is positional only"),
        (many, r"^many: \*a: "),
        (named, r"^named: \*\*a: "),
        (bare, r"^bare: a: has no annotation$"),
        (foreign, r"^foreign: a: complex has no form in JSON"),
        (keys, r"^keys: a: the keys of a dict"),
        (pair, r"^pair: a: tuple\[int, int\] has no form"),
        (inner, r"^inner: a: set\[int\] has no form"),
        (unknown, r"^unknown: .*'Nowhere' is not defined"),
        (noted, r"^noted: a: Annotated takes a description"),
        (later, r"^later: is async"),
        (größe, r"^größe: a tool's name has 1 to 64"),
        (lambda a: a, r"^<lambda>: a tool's name"),
        (functools.partial(weather, "Bern"), r"has no name; a tool needs one$"),
        (tree, r"^tree: a\.left: Tree holds itself"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_functions_that_are_no_tools(function: Callable[..., Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        tool_schema(function)
    with pytest.raises(UsageError, match=words):
        call_function(function, "{}")


def test_what_is_no_function() -> None:
    for wrong in (3, "f", Place):
        with pytest.raises(TypeError, match="a tool is a function"):
            tool_schema(wrong)  # type: ignore[arg-type]


def test_what_is_not_described() -> None:
    def plain(a: int, b: Annotated[str, "what"] = "x") -> None:
        pass

    plain.__annotations__ = {"a": int, "b": Annotated[str, "what"]}
    assert tool_schema(plain)["function"] == {
        "name": "plain",
        "parameters": {
            "type": "object",
            "properties": {
                "a": {"type": "integer"},
                "b": {"type": "string", "description": "what", "default": "x"},
            },
            "required": ["a"],
            "additionalProperties": False,
        },
    }
