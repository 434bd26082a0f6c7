"""Schemas: what is read, what is refused by name, and what a hostile one costs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apertus_mlx.errors import NotFoundError, UsageError
from apertus_mlx.generation.json_schema import ANNOTATIONS, ENFORCED, MAX_BYTES, read_schema
from apertus_mlx.generation.options import SamplingOptions
from apertus_mlx.generation.structured import require_schema

OBJECT: dict[str, Any] = {"type": "object"}
ARRAY: dict[str, Any] = {"type": "array"}
TEXT: dict[str, Any] = {"type": "string"}


def within(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema two levels down, behind a reference."""
    return {
        "type": "object",
        "properties": {"list": {"type": "array", "items": {"$ref": "#/$defs/it"}}},
        "$defs": {"it": schema},
    }


@pytest.mark.parametrize(
    ("keyword", "schema"),
    [
        ("uniqueItems", {**ARRAY, "uniqueItems": True}),
        ("contains", {**ARRAY, "contains": TEXT}),
        ("minContains", {**ARRAY, "minContains": 1}),
        ("maxContains", {**ARRAY, "maxContains": 1}),
        ("additionalItems", {**ARRAY, "additionalItems": False}),
        ("unevaluatedItems", {**ARRAY, "unevaluatedItems": False}),
        ("items", {**ARRAY, "items": [TEXT]}),
        ("not", {"not": TEXT}),
        ("if", {"if": TEXT, "then": {"minLength": 2}, "else": {}}),
        ("then", {"then": {"minLength": 2}}),
        ("else", {"else": {"minLength": 2}}),
        ("dependentSchemas", {**OBJECT, "dependentSchemas": {"a": OBJECT}}),
        ("dependentRequired", {**OBJECT, "dependentRequired": {"a": ["b"]}}),
        ("dependencies", {**OBJECT, "dependencies": {"a": ["b"]}}),
        ("propertyNames", {**OBJECT, "propertyNames": {"pattern": "^a"}}),
        ("unevaluatedProperties", {**OBJECT, "unevaluatedProperties": False}),
        ("minProperties 2", {**OBJECT, "minProperties": 2}),
        ("multipleOf", {"type": "number", "multipleOf": 3}),
        ("multipleOf", {"type": "integer", "multipleOf": 0.5}),
        ("multipleOf", {"multipleOf": 3}),
        ("exclusiveMinimum", {"type": "integer", "exclusiveMinimum": True, "minimum": 3}),
        ("format 'regex'", {**TEXT, "format": "regex"}),
        ("format 'int32'", {"type": "integer", "format": "int32"}),
        ("format 'password'", {**TEXT, "format": "password"}),
        ("contentEncoding", {**TEXT, "contentEncoding": "base64"}),
        ("contentMediaType", {**TEXT, "contentMediaType": "application/json"}),
        ("contentSchema", {**TEXT, "contentSchema": OBJECT}),
        ("nullable", {**TEXT, "nullable": True}),
        ("minlength", {**TEXT, "minlength": 1}),
        ("x-guidance", {"x-guidance": {"lenient": True}}),
        ("$anchor", {"$anchor": "a"}),
        ("$id", {"$id": "https://example.org/a"}),
        ("$dynamicRef", {"$dynamicRef": "#x"}),
        ("$recursiveRef", {"$recursiveRef": "#"}),
        ("$ref 'https://", {"$ref": "https://example.org/a"}),
        ("$ref '#a'", {"$ref": "#a"}),
        ("$ref '#/$defs/none'", {"$ref": "#/$defs/none"}),
        ("pattern '(?=a)b'", {**TEXT, "pattern": "(?=a)b"}),
        ("pattern '(?i)a'", {**TEXT, "pattern": "(?i)a"}),
        ("pattern '[a&&b]'", {**TEXT, "pattern": "[a&&b]"}),
        ("pattern '[[:alpha:]]'", {**TEXT, "pattern": "[[:alpha:]]"}),
        (r"pattern '\\bx'", {**TEXT, "pattern": r"\bx"}),
        (r"pattern '\\Ax'", {**TEXT, "pattern": r"\Ax"}),
        (r"pattern '\\p{L}'", {**TEXT, "pattern": r"\p{L}"}),
        (r"pattern '(a)\\1'", {**TEXT, "pattern": r"(a)\1"}),
        ("pattern '('", {**OBJECT, "patternProperties": {"(": TEXT}}),
        ("control characters", {"const": "\x01"}),
        ("control characters", {"enum": [{"a\x7f": 1}]}),
        ("control characters", {**OBJECT, "properties": {"\x00": TEXT}}),
        ("control characters", {**OBJECT, "required": ["\x1f"]}),
        ("properties: expected an object", {"properties": []}),
        ("required: expected a list", {"required": "a"}),
        ("anyOf: expected a list", {"anyOf": {}}),
        ("expected a schema, found int", {"items": 3}),
        ("expected a schema, found list", {**OBJECT, "additionalProperties": []}),
    ],
)
def test_keywords_that_are_refused(keyword: str, schema: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as error:
        require_schema(within(schema))
    assert str(error.value).startswith("--schema: at #/$defs/it")
    assert keyword in str(error.value)


def test_places() -> None:
    schema = {**OBJECT, "properties": {"tags": {**ARRAY, "uniqueItems": True}}}
    with pytest.raises(UsageError) as error:
        SamplingOptions(schema=schema)
    assert str(error.value) == "--schema: at #/properties/tags: uniqueItems is not supported"
    with pytest.raises(UsageError, match="at #/\\$defs/it/anyOf/1: not is"):
        require_schema(within({"anyOf": [TEXT, {"not": {}}]}))
    with pytest.raises(UsageError, match="at #/x-other/it: not is"):
        require_schema({"$ref": "#/x-other/it", "x-other": {"it": {"not": {}}}})


@pytest.mark.parametrize(
    "schema",
    [
        {"enum": []},
        {**TEXT, "minLength": 5, "maxLength": 2},
        {**TEXT, "const": 3},
        {"type": "zzz"},
        {**TEXT, "minLength": -1},
        {**OBJECT, "properties": {"x": False}, "required": ["x"]},
        {"$ref": "#"},
        {"oneOf": [{"type": "number"}, {"type": "integer"}]},
        {"oneOf": [{"properties": {"a": TEXT}}, {"properties": {"b": TEXT}}]},
        {"type": "integer", "minimum": 10**400},
        {**OBJECT, "patternProperties": {"^a": TEXT, "b$": {"type": "integer"}}},
    ],
)
def test_what_nothing_follows_or_the_engine_cannot_tell(schema: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="--schema: "):
        require_schema(schema)


@pytest.mark.parametrize(
    "schema",
    [
        {"$schema": "http://json-schema.org/draft-07/schema#", **TEXT},
        {"$schema": "https://json-schema.org/draft/2020-12/schema", **TEXT},
        {"$id": "https://example.org/a", "$comment": "c", **TEXT},
        {**TEXT, "title": "t", "description": "d", "default": 3, "examples": [1], "x-order": 1},
        {**TEXT, "deprecated": True, "readOnly": True, "writeOnly": False},
        {**OBJECT, "minProperties": 1},
        {"$ref": "#/definitions/a~1b%20c", "definitions": {"a/b c": TEXT}},
        {**OBJECT, "properties": {"next": {"$ref": "#"}}},
        {**OBJECT, "properties": {"not": TEXT, "uniqueItems": TEXT}},
    ],
)
def test_what_changes_nothing(schema: dict[str, Any]) -> None:
    require_schema(schema)


def test_other_dialects() -> None:
    with pytest.raises(UsageError, match=r"at #: \$schema 'https://example.org' is not supported"):
        require_schema({"$schema": "https://example.org"})
    old = {"$schema": "http://json-schema.org/draft-07/schema#", "prefixItems": [TEXT]}
    with pytest.raises(UsageError, match="prefixItems needs draft 2020-12"):
        require_schema(old)


def test_files_and_texts(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"type": "object", "title": "Z"}).encode())
    assert json.loads(read_schema(path)) == {"type": "object", "title": "Z"}
    assert (
        SamplingOptions(schema=path).schema == SamplingOptions(schema=path.read_text()[1:]).schema
    )
    with pytest.raises(NotFoundError, match=r"none.json: no such file"):
        read_schema(tmp_path / "none.json")
    with pytest.raises(UsageError, match="--schema: "):
        read_schema(tmp_path)
    for text, words in (
        ("", "is empty"),
        ("{", "not valid JSON"),
        ("[]", "expected a JSON object"),
        ('{"a": 1, "a": 1}', "duplicate key 'a'"),
        ('{"maximum": NaN}', "NaN is not a JSON number"),
    ):
        path.write_text(text)
        with pytest.raises(UsageError, match=f"--schema.*: .*{words}"):
            read_schema(path)
    path.write_bytes(b"\xff{}")
    with pytest.raises(UsageError, match="not UTF-8"):
        read_schema(path)


def test_dictionaries_that_are_no_json() -> None:
    circle: dict[str, Any] = {}
    circle["items"] = circle
    for wrong in (circle, {"const": float("nan")}, {"enum": [{1}]}, {"const": "\ud800"}):
        with pytest.raises(UsageError, match="--schema: "):
            read_schema(wrong)
    with pytest.raises(UsageError, match="int is no pydantic model"):
        read_schema(int)
    with pytest.raises(TypeError, match="schema: expected"):
        SamplingOptions(schema=3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("data", "words"),
    [(b"", "is empty"), (b"\xff\xfe{\x00}\x00", "is not UTF-8 text"), (b"[]", "expected a JSON")],
)
def test_a_file_that_is_none_is_named(tmp_path: Path, data: bytes, words: str) -> None:
    (tmp_path / "city.json").write_bytes(data)
    with pytest.raises(UsageError, match=f"^--schema {tmp_path}/city.json: {words}"):
        read_schema(tmp_path / "city.json")
    (tmp_path / "link.json").symlink_to("nowhere")
    with pytest.raises(UsageError, match=r"link\.json: is a broken link$"):
        read_schema(tmp_path / "link.json")


_ODD = st.sampled_from(
    [None, True, 0, 2, -1, 1.5, "", "#", "#/$defs/a", [], [1], ["a"], [None], [{}], {}, {"a": 1},
     {"a": {}}, {"a": True}, {"a": {"$ref": "#/$defs/a"}}, [[]], 10**400]
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(ENFORCED | ANNOTATIONS)), _ODD, max_size=4))
def test_keywords_with_odd_values_are_read_or_refused(schema: dict[str, Any]) -> None:
    for each in (schema, within(schema)):
        try:
            read_schema(each)
        except UsageError as error:
            assert str(error).startswith("--schema: at #")


def test_a_keyword_that_is_read_before_another_is_known_to_be_wrong() -> None:
    with pytest.raises(UsageError, match="at #: required: expected a list"):
        read_schema({"minProperties": 2, "required": None})


def test_the_order_of_keys_stays() -> None:
    names = ["zebra", "apple", "mango"]
    schema = {**OBJECT, "properties": dict.fromkeys(names, TEXT)}
    assert list(json.loads(read_schema(schema))["properties"]) == names


class Pet(pydantic.BaseModel):
    """A class whose schema has a reference, choices, bounds and a list."""

    class Owner(pydantic.BaseModel):
        name: str = pydantic.Field(max_length=9)

    kind: str = pydantic.Field(pattern="^(cat|dog)$")
    weight: float = pydantic.Field(gt=0, le=90)
    owner: Owner | None = None
    tags: list[str] = []


def test_pydantic_classes() -> None:
    assert json.loads(require_schema(Pet))["properties"].keys() == Pet.model_fields.keys()


def test_without_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(UsageError, match=r"--schema needs llguidance.*pip install llguid"):
        SamplingOptions(schema=TEXT)
    with pytest.raises(UsageError, match="not is not supported"):  # said first
        SamplingOptions(schema={"not": {}})


def nested(depth: int, keyword: str) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"anyOf": [schema]} if keyword == "anyOf" else {keyword: schema}
    return schema


def choice(index: int) -> dict[str, Any]:
    return {"anyOf": [{**OBJECT, "properties": {f"{name}{index}": TEXT}} for name in "ab"]}


DOUBLED = {
    f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i - 1}"}] * 2} if i else choice(0) for i in range(20)
}
CHAIN = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(3000)} | {"d3000": TEXT}


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"enum": ["x" * MAX_BYTES]}, "larger than 1,048,576 bytes"),
        (nested(70, "items"), "nested more than 64 levels deep"),
        (nested(40, "anyOf"), "nested more than 64 levels deep"),
        ('{"items":' * 100_000 + "{}" + "}" * 100_000, "too deep"),
        ({"allOf": [choice(i) for i in range(10)]}, "combines more than 100 choices"),
        ({"$ref": "#/$defs/d19", "$defs": DOUBLED}, "combines more than 100 choices"),
        ({"$ref": "#/$defs/d0", "$defs": CHAIN}, "too deeply"),
        ({"anyOf": [{"type": "integer", "multipleOf": 9973 - i} for i in range(9)]}, "multipleOf"),
        ({**OBJECT, "patternProperties": {f"^p{i}_": {} for i in range(99)}}, "more than 32"),
        ({**OBJECT, "properties": {f"p{i}": {} for i in range(6000)}}, "more than 5000 schemas"),
        ({"allOf": [{**TEXT, "pattern": f".*[ab]{{{i},60}}c"} for i in range(1, 12)]}, "enforced"),
    ],
)
def test_hostile_schemas_are_refused(schema: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        require_schema(schema)


@pytest.mark.parametrize(
    "schema",
    [
        {**TEXT, "pattern": "^((a{1,1000}){1,1000}){1,1000}$"},
        {**TEXT, "minLength": 10**9},
        {**ARRAY, "items": {**ARRAY, "minItems": 10**9}, "minItems": 10**9},
        {"type": "integer", "minimum": -(10**17), "maximum": 10**17, "multipleOf": 9973},
        {"enum": [f"value {i}" for i in range(2000)]},
        {"anyOf": [{"const": i} for i in range(500)]},
    ],
)
def test_large_numbers_are_none(schema: dict[str, Any]) -> None:
    require_schema(schema)
