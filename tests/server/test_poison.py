"""Requests that have ended other servers, or should not be answered: their codes, then a token."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import pytest

from apertus_mlx.server.body import MAX_BODY_BYTES
from apertus_mlx.server.fields import fields_of
from benchmarks.poison_requests import KINDS, fault, open_files, send_random
from tests.server.running import QUESTION, Server, serving

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
CALLED = [*QUESTION, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "7"}


def schema(value: Any) -> dict[str, Any]:
    return {
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": value}}
    }


def nested(depth: int) -> Any:
    found: Any = {"type": "integer"}
    for _ in range(depth):
        found = {"type": "array", "items": found}
    return found


def message(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "Hi", **fields}]}


# A chat's fields, the status, and the beginning of `param`.
CHATS: tuple[tuple[dict[str, Any], int, str | None], ...] = (
    ({"messages": None}, 400, "messages"),
    ({"messages": "Hi"}, 400, "messages"),
    ({"messages": []}, 400, "messages"),
    ({"messages": [None]}, 400, "messages[0]"),
    ({"messages": QUESTION * 10_001}, 400, "messages"),
    (message(role="root"), 400, "messages[0].role"),
    (message(role=None), 400, "messages[0].role"),
    (message(content=None), 400, "messages[0].content"),
    (message(content=5), 400, "messages[0].content"),
    (message(content="\ud800"), 400, "messages[0].content"),
    (message(content=[{"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/x"}}]), 400,
     "messages[0].content[0].type"),
    (message(content=[{"type": "input_audio", "input_audio": {"data": ""}}]), 400,
     "messages[0].content[0].type"),
    (message(content="word " * 30_000), 400, "messages"),
    (message(content="word " * 2_500), 400, "messages"),
    ({"messages": [RESULT]}, 400, "messages[0].role"),
    ({"messages": [*CALLED, {**RESULT, "tool_call_id": "c2"}]}, 400, "messages[2].tool_call_id"),
    ({"messages": [*CALLED, RESULT, RESULT]}, 400, "messages[3].tool_call_id"),
    ({"messages": [*CALLED, QUESTION[0]]}, 400, "messages[1].tool_calls[0].id"),
    ({"messages": [*QUESTION, {"role": "assistant", "tool_calls": [
        {**CALL, "function": {"name": "f", "arguments": "{"}}]}, RESULT]}, 400, "messages[1]"),
    ({"max_tokens": 0}, 400, "max_tokens"),
    ({"max_tokens": True}, 400, "max_tokens"),
    ({"max_tokens": "5"}, 400, "max_tokens"),
    ({"max_tokens": 10**9}, 400, "max_tokens"),
    ({"max_completion_tokens": 10**9}, 400, "max_completion_tokens"),
    ({"top_k": 10**9}, 200, None),
    ({"top_k": 2**70}, 200, None),
    ({"top_k": -2}, 400, "top_k"),
    ({"temperature": float("nan")}, 400, None),
    ({"temperature": 1e308}, 400, "temperature"),
    ({"temperature": True}, 400, "temperature"),
    ({"top_p": 0}, 400, "top_p"),
    ({"min_p": 2}, 400, "min_p"),
    ({"repetition_penalty": 0}, 400, "repetition_penalty"),
    ({"stop": 5}, 400, "stop"),
    ({"stop": ""}, 400, "stop"),
    ({"stop": ["", "x"]}, 200, None),
    ({"stop": ["x"] * 65}, 400, "stop"),
    ({"stop": ["x" * 1000]}, 400, "stop"),
    ({"stop": ["\ud800"]}, 400, "stop"),
    ({"logit_bias": {"99999": 1}}, 400, "logit_bias"),
    ({"logit_bias": {str(i): 1 for i in range(1500)}}, 400, "logit_bias"),
    ({"logit_bias": {"5": 101}}, 400, "logit_bias"),
    ({"seed": -1}, 400, "seed"),
    ({"seed": 2**70}, 400, "seed"),
    ({"n": 0}, 400, "n"),
    ({"n": 2}, 200, None),
    ({"n": 100}, 400, "n"),
    ({"logprobs": 2}, 400, "logprobs"),
    ({"top_logprobs": 21, "logprobs": True}, 400, "top_logprobs"),
    ({"top_logprobs": 2}, 400, "top_logprobs"),
    ({"stream_options": {}}, 400, "stream_options"),
    ({"stream_options": {}, "stream": True}, 200, None),
    ({"model": "gpt-4"}, 404, "model"),
    ({"model": "../../x"}, 404, "model"),
    ({"model": "https://example.org/m"}, 404, "model"),
    ({"chat_template": "{{ 7*7 }}"}, 400, "chat_template"),
    ({"chat_template_kwargs": {"x": 1}}, 400, "chat_template_kwargs.x"),
    ({"adapters": "x"}, 400, "adapters"),
    ({"draft_model": "x"}, 400, "draft_model"),
    ({"store": True}, 400, "store"),
    ({"store": False}, 200, None),
    ({"no_such_field": 1}, 400, "no_such_field"),
    ({"no_such_field": None}, 200, None),
    ({**dict.fromkeys(fields_of("chat")), "messages": QUESTION, "max_tokens": 2}, 200, None),
    ({"response_format": {"type": "zzz"}}, 400, "response_format.type"),
    (schema({"type": "array", "uniqueItems": True}), 400, "response_format.json_schema.schema"),
    (schema(nested(100)), 400, None),
    (schema({"$ref": "#"}), 400, "response_format.json_schema.schema"),
    (schema({"$ref": "http://127.0.0.1:1/x"}), 400, "response_format.json_schema.schema"),
    (schema({"description": "x" * 2**20}), 400, "response_format.json_schema.schema"),
    ({"tools": [TOOL] * 2}, 400, "tools[1].function.name"),
    ({"tools": [{"type": "function", "function": {}}]}, 400, "tools[0].function.name"),
    ({"tools": [TOOL] * 10_000}, 400, "tools"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, 400,
     "tool_choice"),
    ({"tool_choice": "required"}, 400, "tool_choice"),
    ({"functions": [{}]}, 400, "functions"),
    ({"reasoning_effort": "huge"}, 400, "reasoning_effort"),
    ({"reasoning_effort": "low", "reasoning": {"effort": "none"}}, 400, "reasoning_effort"),
    ({"continue_final_message": True}, 400, "messages"),
)  # fmt: skip
COMPLETIONS: tuple[tuple[dict[str, Any], int, str | None], ...] = (
    ({"prompt": ""}, 400, "prompt"),
    ({"prompt": None}, 400, "prompt"),
    ({"prompt": []}, 400, "prompt"),
    ({"prompt": [""]}, 400, "prompt[0]"),
    ({"prompt": [[]]}, 400, "prompt[0]"),
    ({"prompt": ["a", "b"]}, 200, None),
    ({"prompt": [1, 500, 600]}, 200, None),
    ({"prompt": [[1, 500], [1, 600]]}, 200, None),
    ({"prompt": [1, 99_999]}, 400, "prompt[1]"),
    ({"prompt": [1, -1]}, 400, "prompt[1]"),
    ({"prompt": [1, "a"]}, 400, "prompt[1]"),
    ({"prompt": ["a"] * 33}, 400, "prompt"),
    ({"prompt": "\ud800"}, 400, "prompt"),
    ({"prompt": "word " * 30_000}, 400, "prompt"),
    ({**dict.fromkeys(fields_of("completions")), "prompt": "a"}, 200, None),
    ({"prompt": "a", "suffix": "b"}, 400, "suffix"),
    ({"prompt": "a", "echo": True}, 400, "echo"),
    ({"prompt": "a", "best_of": 3}, 400, "best_of"),
    ({"prompt": "a", "logprobs": True}, 400, "logprobs"),
    ({"prompt": "a", "prompt_logprobs": 1, "stream": True}, 400, "prompt_logprobs"),
)
BODIES = (
    b"", b"{", b"\xff", b"[" * 100_000, b'{"a": 1, "a": 2}', b'{"a": NaN}', b"[]", b'"x"',
    b'{"seed": ' + b"9" * 5000 + b"}",
)  # fmt: skip


def require_error(response: Any, status: int, param: str | None) -> None:
    assert response.status_code == status, response.text
    if status != 200:
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["message"]
        if param is not None:
            assert error["param"].startswith(param), error


@pytest.mark.parametrize(("fields", "status", "param"), CHATS)
def test_a_chat(server: Server, fields: Any, status: int, param: str | None) -> None:
    require_error(server.chat(**{"max_tokens": 2, **fields}), status, param)
    server.lives()


@pytest.mark.parametrize(("fields", "status", "param"), COMPLETIONS)
def test_a_completion(server: Server, fields: Any, status: int, param: str | None) -> None:
    response = server.post("/v1/completions", {"max_tokens": 2, **fields})
    require_error(response, status, param)
    server.lives()


@pytest.mark.parametrize("body", BODIES)
def test_a_body(server: Server, body: bytes) -> None:
    for path in ("/v1/chat/completions", "/v1/completions", "/tokenize"):
        require_error(server.post(path, body), 400, None)
    server.lives()


def test_context_overflow_has_its_code_and_both_counts(server: Server) -> None:
    error = server.chat(**message(content="word " * 2_500)).json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert "2048" in error["message"] and "tokens" in error["message"]


def test_a_prompt_that_is_an_earlier_prompt_and_its_answer(server: Server) -> None:
    """So that nothing of it is left to compute."""
    first = server.post("/v1/completions", {"prompt": [1, 500], "max_tokens": 4, "temperature": 0})
    asked = {"prompt": [1, 500], "max_tokens": 4, "temperature": 0, "prompt_logprobs": 0}
    assert first.status_code == server.post("/v1/completions", asked).status_code == 200
    text = first.json()["choices"][0]["text"]
    ids = server.post("/tokenize", {"prompt": text, "add_special_tokens": False}).json()["tokens"]
    for _ in range(2):
        again = server.post("/v1/completions", {"prompt": [1, 500, *ids], "max_tokens": 2})
        assert again.status_code == 200
    server.lives()


def test_other_ways_to_be_wrong(server: Server) -> None:
    whole = json.dumps({"messages": QUESTION}).encode()
    for headers, status in (
        ({"content-type": "text/plain"}, 415),
        ({"content-type": ""}, 415),
        ({"host": "evil.example"}, 403),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"content-length": str(MAX_BODY_BYTES + 1)}, 413),
    ):
        sent = {"content-type": "application/json", **headers}
        response = server.post("/v1/chat/completions", content=whole, headers=sent)
        require_error(response, status, None)
    for method, path, status in (
        ("POST", "/v1/embeddings", 404),
        ("GET", "/v1/chat/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("GET", "/v1//", 404),
        ("GET", "/v1/models/%2e%2e/%2e%2e/etc/passwd", 404),
        ("GET", "/metrics", 404),
    ):
        require_error(server.run(server.ask(method, path)), status, None)
    server.lives()


def test_a_body_that_is_too_large_or_too_slow() -> None:
    async def slow() -> Any:
        import asyncio

        yield b"{"
        await asyncio.Event().wait()

    with serving(most_body_bytes=100, body_timeout_s=0.05) as server:
        headers = {"content-type": "application/json"}

        async def large() -> Any:
            for _ in range(1000):
                yield b" " * 10

        for body, status in ((large(), 413), (slow(), 408)):
            response = server.post("/tokenize", content=body, headers=headers)
            require_error(response, status, None)
        server.lives()


@pytest.fixture(scope="module")
def poisoned() -> Iterator[Server]:
    with serving() as found:
        yield found


@pytest.mark.parametrize("count", [2 * len(KINDS), pytest.param(1000, marks=pytest.mark.nightly)])
def test_random_requests(poisoned: Server, count: int) -> None:
    files = 0
    for number in range(count):
        rng = random.Random(number)
        kind = KINDS[number % len(KINDS)]
        request, response = send_random(
            lambda *a, **b: poisoned.run(poisoned.ask(*a, **b)), kind, rng
        )
        assert fault(response.status_code, response.text) is None, (number, request, response.text)
        poisoned.lives()
        files = files or open_files()
    assert open_files() <= files


def test_there_are_enough_kinds() -> None:
    assert len(KINDS) >= 20 and len(CHATS) + len(COMPLETIONS) + len(BODIES) >= 60
