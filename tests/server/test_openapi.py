"""GET /openapi.json says what the server does: its paths, statuses, requests and answers."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import pytest

from apertus_mlx.server.app import Endpoints
from apertus_mlx.server.fields import FIELDS, Given
from apertus_mlx.server.openapi import describe
from tests.server.running import QUESTION, Server, serving
from tests.server.test_page import PAGE
from tests.server.test_poison import CHATS, COMPLETIONS

METHODS = {"get", "post"}
TOOL = {"type": "function", "function": {"name": "now"}}
SCHEMA = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"],
          "additionalProperties": False}  # fmt: skip

FORM = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}


@pytest.fixture(scope="module")
def told(server: Server) -> dict[str, Any]:
    found: dict[str, Any] = server.get("/openapi.json").json()
    return found


def validator(told: dict[str, Any], schema: Any) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator({**schema, "components": told["components"]})


def body(told: dict[str, Any], path: str) -> jsonschema.Draft202012Validator:
    content = told["paths"][path]["post"]["requestBody"]["content"]
    return validator(told, content["application/json"]["schema"])


def test_all_paths_and_their_methods_are_told(server: Server) -> None:
    routes = Endpoints(server.engine, server.model, metrics=True).routes()
    served = {
        (route.path.replace(":path", ""), method.lower())
        for route in routes
        for method in route.methods or ()
        if method != "HEAD"
    }
    paths = describe(["tiny"], metrics=True)["paths"]
    assert served == {(path, method) for path, each in paths.items() for method in each}
    assert "/metrics" not in server.get("/openapi.json").json()["paths"]


def test_a_wrong_method_is_told_the_right_ones(server: Server, told: dict[str, Any]) -> None:
    for path, methods in told["paths"].items():
        wanted = {method.upper() for method in methods}
        wanted |= {"HEAD"} if "get" in methods else set()
        response = server.run(server.ask("PUT", path.replace("{", "").replace("}", "")))
        assert response.status_code == 405, path
        assert set(response.headers["allow"].split(", ")) == wanted, path


def test_the_page_has_the_same_statuses(told: dict[str, Any]) -> None:
    rows = dict(re.findall(r"^\| (\d{3}) \| (.*) \|$", PAGE.read_text("utf-8"), re.MULTILINE))
    assert len(rows) > 10
    responses = [each["responses"] for path in told["paths"].values() for each in path.values()]
    words = {code: found["description"] for each in responses for code, found in each.items()}
    # Which methods work is told by the paths themselves.
    del words["200"]
    assert {**words, "405": rows["405"]} == rows


def test_all_schemas_are_schemas(told: dict[str, Any]) -> None:
    for schema in told["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)
    for path in ("/v1/chat/completions", "/v1/completions", "/detokenize"):
        jsonschema.Draft202012Validator.check_schema(body(told, path).schema)


def test_all_fields_are_told_with_what_they_take(told: dict[str, Any]) -> None:
    for path, endpoint in (("/v1/chat/completions", "chat"), ("/v1/completions", "completions")):
        properties = body(told, path).schema["properties"]
        for field in FIELDS:
            if endpoint in field.endpoints:
                free = field.treatment == "ignored"
                assert (properties.get(field.name) == {}) == free, field.name
                assert not isinstance(field.kind, Given) or field.name in properties


@pytest.mark.parametrize(("path", "rows"), [("chat/", CHATS), ("", COMPLETIONS)])
def test_what_is_told_wrong_is_refused(told: dict[str, Any], path: str, rows: Any) -> None:
    """A body that the description does not allow is none that is answered with 200."""
    given = body(told, f"/v1/{path}completions")
    refused = 0
    for fields, status, _ in rows:
        if len(fields.get("messages") or ()) > 1000:  # takes seconds
            continue
        known = given.is_valid({**({"messages": QUESTION} if path else {}), **fields})
        assert known or status != 200, fields
        refused += not known
    assert refused > len(rows) / 2


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 2, "max_tokens": 3, "logprobs": True, "top_logprobs": 2, "user": {}, "unknown": None},
        {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False},
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "now"}}},
        {"response_format": FORM},
        {"chat_template_kwargs": {"enable_thinking": True}, "max_tokens": 8, "stop": ["a", ""]},
    ],
)  # fmt: skip
def test_chats_are_as_told(server: Server, told: dict[str, Any], fields: Any) -> None:
    asked = {"messages": QUESTION, "max_tokens": 60, "seed": 1, **fields}
    body(told, "/v1/chat/completions").validate(asked)
    whole = server.post("/v1/chat/completions", asked)
    assert whole.status_code == 200, whole.text
    require(told, "/v1/chat/completions", whole.json())
    asked |= {"stream_options": {"include_usage": True}}
    chunk = validator(told, {"$ref": "#/components/schemas/ChatCompletionChunk"})
    for event in server.events("/v1/chat/completions", asked)[:-1]:
        chunk.validate(event)


def test_texts_are_as_told(server: Server, told: dict[str, Any]) -> None:
    asked = {"prompt": ["a", "b"], "max_tokens": 3, "logprobs": 2}
    for more in ({}, {"prompt_logprobs": 1}):
        answer = server.post("/v1/completions", {**asked, **more}).json()
        require(told, "/v1/completions", answer)
    chunk = validator(told, {"$ref": "#/components/schemas/CompletionChunk"})
    for event in server.events("/v1/completions", asked)[:-1]:
        chunk.validate(event)


def test_all_else_is_as_told(server: Server, told: dict[str, Any]) -> None:
    chat = {"messages": QUESTION}
    for path, given in (
        ("/tokenize", {"prompt": "a", "return_token_strs": True, "x": None}),
        ("/tokenize", {**chat, "return_token_strs": False}),
        ("/detokenize", {"tokens": [1, 500]}),
        ("/apply-template", chat),
        ("/v1/chat/completions/input_tokens", chat),
    ):
        body(told, path).validate(given)
        require(told, path, server.post(path, given).json())
    for path in ("/v1/models", "/v1/status", "/health"):
        require(told, path, server.get(path).json())
    require(told, "/v1/models/{name}", server.get("/v1/models/tiny").json())
    error = validator(told, {"$ref": "#/components/schemas/Error"})
    for response in (server.chat(seed=-1), server.get("/v1/models/x"), server.get("/x")):
        error.validate(response.json())
    with serving(wait=False, load=lambda: 1 / 0) as broken:  # type: ignore[arg-type, return-value]
        error.validate(broken.get("/health").json())


def require(told: dict[str, Any], path: str, answer: Any) -> None:
    [operation] = [each for method, each in told["paths"][path].items() if method in METHODS]
    content = operation["responses"]["200"]["content"]["application/json"]
    validator(told, content["schema"]).validate(answer)


def test_a_key_is_told() -> None:
    document = describe(["tiny"], key=True)
    [name] = document["components"]["securitySchemes"]
    assert document["security"] == [{name: []}]
    assert document["paths"]["/health"]["get"]["security"] == []
    json.dumps(document)
