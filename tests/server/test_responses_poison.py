"""Requests for responses that are wrong in some way: their codes, the description, then a token."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from apertus_mlx.server.fields import fields_of
from apertus_mlx.server.response_fields import RESPONSE_FIELDS
from tests.server.running import QUESTION, Server
from tests.server.test_poison import BODIES, nested, require_error

PATH = "/v1/responses"
TOOL = {"type": "function", "name": "f", "parameters": {"type": "object"}}
CALL = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"}
RESULT = {"type": "function_call_output", "call_id": "c1", "output": "7"}


def form(schema: Any) -> dict[str, Any]:
    return {"text": {"format": {"type": "json_schema", "name": "x", "schema": schema}}}


def content(*parts: Any) -> dict[str, Any]:
    return {"input": [{"role": "user", "content": list(parts)}]}


# Fields, the status, and `param`.
ROWS: tuple[tuple[dict[str, Any], int, str | None], ...] = (
    ({"input": None}, 400, "input"),
    ({"input": ""}, 400, "input"),
    ({"input": []}, 400, "input"),
    ({"input": 5}, 400, "input"),
    ({"input": "\ud800"}, 400, "input"),
    ({"input": ["a"]}, 400, "input[0]"),
    ({"input": [{}]}, 400, "input[0].type"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, 400, "input[0].type"),
    ({"input": [{"type": "local_shell_call"}]}, 400, "input[0].type"),
    ({"input": QUESTION * 10_001}, 400, "input"),
    ({"input": [{"role": "root", "content": "x"}]}, 400, "input[0].role"),
    ({"input": [{"role": "user"}]}, 400, "input[0].content"),
    (content({"type": "input_image", "image_url": "http://127.0.0.1:1/x"}), 400,
     "input[0].content[0].type"),
    (content({"type": "input_file", "file_id": "x"}), 400, "input[0].content[0].type"),
    (content({"type": "input_text", "text": 5}), 400, "input[0].content[0].text"),
    (content({"type": "input_text", "text": "\ud800"}), 400, "input[0]"),
    ({"input": [RESULT]}, 400, "input[0]"),
    ({"input": [*QUESTION, CALL, {**RESULT, "call_id": "c2"}]}, 400, "input[2]"),
    ({"input": [*QUESTION, CALL, QUESTION[0]]}, 400, "input[1]"),
    ({"input": [*QUESTION, {**CALL, "arguments": "{"}, RESULT]}, 400, "input[1]"),
    ({"input": [*QUESTION, {**CALL, "arguments": {}}, RESULT]}, 400, "input[1].arguments"),
    ({"input": [*QUESTION, CALL, RESULT]}, 200, None),
    ({"input": [{"type": "reasoning", "summary": [], "encrypted_content": "x"}]}, 400,
     "input[0].encrypted_content"),
    ({"input": "word " * 2_500}, 400, "input"),
    ({"instructions": ["x"]}, 400, "instructions"),
    ({"max_output_tokens": 0}, 400, "max_output_tokens"),
    ({"max_output_tokens": 10**9}, 400, "max_output_tokens"),
    ({"temperature": 1e308}, 400, "temperature"),
    ({"temperature": True}, 400, "temperature"),
    ({"top_p": 0}, 400, "top_p"),
    ({"top_logprobs": 2}, 400, "top_logprobs"),
    ({"model": "gpt-5"}, 404, "model"),
    ({"previous_response_id": "resp_x"}, 400, "previous_response_id"),
    ({"previous_response_id": 5}, 400, "previous_response_id"),
    ({"store": "yes"}, 400, "store"),
    ({"background": True}, 400, "background"),
    ({"conversation": "x"}, 400, "conversation"),
    ({"prompt": {"id": "x"}}, 400, "prompt"),
    ({"truncation": "auto"}, 400, "truncation"),
    ({"truncation": "disabled", "background": False, "user": {}}, 200, None),
    ({"include": ["message.output_text.logprobs"]}, 400, "include[0]"),
    ({"include": "x"}, 400, "include"),
    ({"metadata": {"a": 5}}, 400, "metadata"),
    ({"metadata": {str(i): "" for i in range(17)}}, 400, "metadata"),
    ({"metadata": {"a": "x" * 513}}, 400, "metadata"),
    ({"reasoning": {"effort": "huge"}}, 400, "reasoning.effort"),
    ({"reasoning": {"summary": "detailed"}}, 400, "reasoning.summary"),
    ({"reasoning": {"x": 1}}, 400, "reasoning.x"),
    ({"text": {"format": {"type": "zzz"}}}, 400, "text.format.type"),
    ({"text": {"format": 5}}, 400, "text.format"),
    (form({"type": "array", "uniqueItems": True}), 400, "text.format.schema"),
    (form(nested(100)), 400, None),
    ({"tools": 5}, 400, "tools"),
    ({"tools": [{"type": "web_search"}]}, 200, None),
    ({"tools": [{"type": "file_search"}]}, 400, "tools[0].type"),
    ({"tools": [{"type": "custom", "name": "x"}]}, 400, "tools[0].type"),
    ({"tools": [{"type": "web_search"}, {**TOOL, "name": "a b"}]}, 400, "tools[1].name"),
    ({"tools": [TOOL, {**TOOL, "x": 1}]}, 400, "tools[1].x"),
    ({"tools": [{"type": "web_search"}, {**TOOL, "strict": 5}]}, 400, "tools[1].strict"),
    ({"tools": [TOOL] * 300}, 400, "tools"),
    ({"tool_choice": "required"}, 400, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "web_search"}}, 400, "tool_choice.type"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "g"}}, 400, "tool_choice"),
    ({"no_such_field": 1}, 400, "no_such_field"),
    ({**dict.fromkeys(fields_of("responses", RESPONSE_FIELDS)), "input": "Hi"}, 200, None),
)  # fmt: skip


@pytest.mark.parametrize(("fields", "status", "param"), ROWS)
def test_a_request(server: Server, fields: Any, status: int, param: str | None) -> None:
    response = server.post(PATH, {"input": "Hi", "max_output_tokens": 2, **fields})
    require_error(response, status, None)
    if status != 200:
        assert response.json()["error"]["param"] == param or param is None, response.text


def test_bodies_and_methods(server: Server) -> None:
    for body in BODIES:
        require_error(server.post(PATH, body), 400, None)
    plain = {"content": b"{}", "headers": {"content-type": "text/plain"}}
    require_error(server.post(PATH, **plain), 415, None)
    for method, path, status in (
        ("GET", PATH, 405),
        ("PUT", f"{PATH}/x", 405),
        ("GET", f"{PATH}/x", 404),
        ("GET", f"{PATH}/x?stream=true", 400),
        ("DELETE", f"{PATH}/%00", 404),
    ):
        require_error(server.run(server.ask(method, path)), status, None)


def test_what_is_told_wrong_is_refused(server: Server) -> None:
    """A body that the description does not allow is none that is answered with 200."""
    told = server.get("/openapi.json").json()
    content = told["paths"][PATH]["post"]["requestBody"]["content"]
    given = jsonschema.Draft202012Validator(content["application/json"]["schema"])
    refused = 0
    for fields, status, _ in ROWS:
        if len(str(fields.get("input"))) > 100_000:  # takes seconds
            continue
        known = given.is_valid({"input": "Hi", "max_output_tokens": 2, **fields})
        assert known or status != 200, fields
        refused += not known
    assert refused > len(ROWS) / 2


def test_answers_are_as_told(server: Server) -> None:
    told = server.get("/openapi.json").json()

    def require(name: str, value: Any) -> None:
        schema = {"$ref": f"#/components/schemas/{name}", "components": told["components"]}
        jsonschema.Draft202012Validator(schema).validate(value)

    asked = {"input": "Hi", "max_output_tokens": 12, "reasoning": {"effort": "high"}}
    for more in ({}, {"tools": [TOOL], "tool_choice": "required", "metadata": {"a": "b"}}):
        whole = server.post(PATH, {**asked, **more}).json()
        require("Response", whole)
        require("Response", server.get(f"{PATH}/{whole['id']}").json())
        response = server.post(PATH, {**asked, **more, "stream": True})
        datas = [line[6:] for line in response.text.split("\n") if line.startswith("data: ")]
        for data in datas:
            require("ResponseEvent", json.loads(data))
    gone = server.run(server.ask("DELETE", f"{PATH}/{whole['id']}"))
    require("ResponseDeleted", gone.json())
    require("InputTokens", server.post(f"{PATH}/input_tokens", {"input": "Hi"}).json())
