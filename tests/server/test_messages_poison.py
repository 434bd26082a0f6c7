"""Bodies of /v1/messages that are refused: their codes in Anthropic's form, then a token."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from apertus_mlx.server.engine import EngineLimits
from apertus_mlx.server.errors import ApiError
from apertus_mlx.server.fields import fields_of
from apertus_mlx.server.message_fields import MESSAGE_FIELDS
from apertus_mlx.server.security import Access
from tests.daily import every
from tests.server.running import QUESTION, Server, serving
from tests.server.test_messages import PATH, TOOLS, USE, result, text, turn
from tests.server.test_poison import BODIES
from tests.server.test_stream import LONG, Client, wait_until_idle

CALLED = [*QUESTION, turn("assistant", USE)]


def blocks(*given: Any, role: str = "user") -> dict[str, Any]:
    return {"messages": [*QUESTION, turn(role, *given)] if role != "user" else [turn(role, *given)]}


def tool(**more: Any) -> dict[str, Any]:
    return {"tools": [{**TOOLS[0], **more}]}


# Fields, the status, and how the message begins.
ROWS: tuple[tuple[dict[str, Any], int, str], ...] = (
    ({"messages": None}, 400, "messages: is missing"),
    ({"messages": "Hi"}, 400, "messages: "),
    ({"messages": []}, 400, "messages: "),
    ({"messages": [None]}, 400, "messages[0]: "),
    ({"messages": QUESTION * 10_001}, 400, "messages: "),
    ({"messages": [{"role": "root", "content": "a"}]}, 400, "messages[0].role: "),
    ({"messages": [{"role": "tool", "content": "a"}]}, 400, "messages[0].role: "),
    ({"messages": [{"content": "a"}]}, 400, "messages[0].role: "),
    ({"messages": [{"role": "user"}]}, 400, "messages[0].content: "),
    ({"messages": [{"role": "user", "content": 5}]}, 400, "messages[0].content: "),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, "messages[0].content: "),
    (blocks(5), 400, "messages[0].content[0]: "),
    (blocks({"type": "text"}), 400, "messages[0].content[0].text: "),
    (blocks({"type": "image", "source": {"type": "url", "url": "http://127.0.0.1:1/x"}}), 400,
     "messages[0].content[0].type: 'image' is not supported"),
    (blocks({"type": "document", "source": {}}), 400,
     "messages[0].content[0].type: 'document' is not supported"),
    (blocks(USE), 400, "messages[0].content[0].type: 'tool_use' is not supported"),
    (blocks(result("5")), 400, "messages[0].content[0].tool_use_id: "),
    (blocks(result("5"), role="system"), 400, "messages[1].content[0].type: "),
    (blocks({"type": "server_tool_use", "id": "x"}, role="assistant"), 400,
     "messages[1].content[0].type: "),
    (blocks({**USE, "input": "{}"}, role="assistant"), 400, "messages[1].content[0].input: "),
    (blocks({**USE, "id": None}, role="assistant"), 400, "messages[1].content[0].id: "),
    (blocks({**USE, "name": ""}, role="assistant"), 400, "messages[1].content[0].name: "),
    (blocks(USE, USE, role="assistant"), 400, "messages[1].content[1].id: "),
    (blocks(USE, text("a"), role="assistant"), 400, "messages[1].content[1]: "),
    (blocks(USE, role="assistant"), 400, "messages: "),
    ({"messages": [*CALLED, *QUESTION]}, 400, "messages[2].content: "),
    ({"messages": [*CALLED, turn("user", text("a"), result("5"))]}, 400,
     "messages[2].content[1]: "),
    ({"messages": [*CALLED, turn("user", result("5"), result("5"))]}, 400,
     "messages[2].content[1].tool_use_id: "),
    ({"messages": [*CALLED, turn("user", result(5))]}, 400, "messages[2].content[0].content: "),
    ({"messages": [*CALLED, turn("user", result([{"type": "image"}]))]}, 400,
     "messages[2].content[0].content[0].type: "),
    ({"messages": [*CALLED, turn("user", result("a", is_error=1))]}, 400,
     "messages[2].content[0].is_error: "),
    ({"messages": [*CALLED, turn("user", result("a"))]}, 200, ""),
    ({"messages": [{"role": "user", "content": "word " * 2_500}]}, 400, "prompt is too long: "),
    ({"messages": [{"role": "user", "content": "word " * 30_000}]}, 400, "prompt is too long: "),
    ({"system": 5}, 400, "system: "),
    ({"system": [{"type": "image"}]}, 400, "system[0].type: "),
    ({"system": []}, 200, ""),
    ({"max_tokens": None}, 400, "max_tokens: is missing"),
    ({"max_tokens": 0}, 400, "max_tokens: "),
    ({"max_tokens": True}, 400, "max_tokens: "),
    ({"max_tokens": 10**9}, 400, "max_tokens: "),
    ({"temperature": 1e308}, 400, "temperature: "),
    ({"temperature": "1"}, 400, "temperature: "),
    ({"top_p": 0}, 400, "top_p: "),
    ({"top_k": 2**70}, 200, ""),
    ({"stop_sequences": "a"}, 400, "stop_sequences: "),
    ({"stop_sequences": [5]}, 400, "stop_sequences: "),
    ({"stop_sequences": ["x"] * 65}, 400, "stop_sequences: "),
    ({"stop_sequences": ["x" * 1000]}, 400, "stop_sequences: "),
    ({"stop_sequences": ["\ud800"]}, 400, "stop_sequences[0]: "),
    ({"stop_sequences": ["", "x"]}, 200, ""),
    ({"stream": 1}, 400, "stream: "),
    ({"model": "claude-x"}, 404, "model claude-x: "),
    ({"model": 5}, 400, "model: "),
    ({"n": 2}, 400, "n: is not supported"),
    ({"no_such_field": None}, 200, ""),
    ({"mcp_servers": [{"url": "http://127.0.0.1:1"}]}, 400, "mcp_servers: is not supported"),
    ({"container": "x"}, 400, "container: is not supported"),
    ({"speed": "fast"}, 400, "speed: is not supported"),
    ({"metadata": {"user_id": "x"}, "service_tier": "auto", "cache_control": {"type": "ephemeral"},
      "context_management": {"edits": []}, "speed": "standard", "mcp_servers": []}, 200, ""),
    ({**dict.fromkeys(fields_of("messages", MESSAGE_FIELDS)), "messages": QUESTION,
      "max_tokens": 2}, 200, ""),
    ({"thinking": {}}, 400, "thinking.type: "),
    ({"thinking": True}, 400, "thinking: "),
    ({"thinking": {"type": ["enabled"]}}, 400, "thinking.type: "),
    ({"thinking": {"type": "enabled"}}, 400, "thinking.budget_tokens: "),
    ({"thinking": {"type": "enabled", "budget_tokens": 2}}, 400, "thinking.budget_tokens: "),
    ({"thinking": {"type": "enabled", "budget_tokens": True}}, 400, "thinking.budget_tokens: "),
    ({"thinking": {"type": "adaptive", "budget_tokens": 1}}, 400, "thinking.budget_tokens: "),
    ({"thinking": {"type": "adaptive", "display": "loud"}}, 400, "thinking.display: "),
    ({"output_config": {"effort": "huge"}}, 400, "output_config.effort: "),
    ({"output_config": {"x": 1}}, 400, "output_config.x: is not supported"),
    ({"output_config": {"format": {"type": "regex"}}}, 400, "output_config.format.type: "),
    ({"output_config": {"format": {"type": "json_schema"}}}, 400, "output_config.format.schema: "),
    ({"output_config": {"format": {"type": "json_schema", "schema": {"$ref": "#"}}}}, 400,
     "output_config.format.schema"),
    ({"tools": {}}, 400, "tools: "),
    ({"tools": [5]}, 400, "tools[0]: "),
    ({"tools": TOOLS * 10_000}, 400, "tools: "),
    ({"tools": TOOLS * 2}, 400, "tools[1].name: "),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, 400,
     "tools[0].type: web_search_20250305 is not supported"),
    ({"tools": [{"name": "f"}]}, 400, "tools[0].input_schema: is missing"),
    (tool(name="f g"), 400, "tools[0].name: "),
    (tool(input_schema=5), 400, "tools[0].input_schema: "),
    (tool(input_schema={"type": "array"}), 400, "tools[0].input_schema.type: "),
    (tool(strict=1), 400, "tools[0].strict: "),
    (tool(input_examples=[{}]), 400, "tools[0].input_examples: is not supported"),
    (tool(defer_loading=True), 400, "tools[0].defer_loading: is not supported"),
    (tool(eager_input_streaming=True, allowed_callers=["direct"]), 200, ""),
    ({"tool_choice": "auto"}, 400, "tool_choice: "),
    ({"tool_choice": {"type": "any"}}, 400, "tool_choice: "),
    ({"tool_choice": {"type": {}}}, 400, "tool_choice.type: "),
    ({**tool(), "tool_choice": {"type": "tool"}}, 400, "tool_choice.name: "),
    ({**tool(), "tool_choice": {"type": "tool", "name": "g"}}, 400, "tool_choice: "),
    ({**tool(), "tool_choice": {"type": "auto", "disable_parallel_tool_use": 1}}, 400,
     "tool_choice.disable_parallel_tool_use: "),
)  # fmt: skip
TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error",
    404: "not_found_error", 405: "invalid_request_error", 413: "request_too_large",
    415: "invalid_request_error", 429: "rate_limit_error", 503: "overloaded_error",
}  # fmt: skip


def require_error(response: Any, status: int, begins: str = "") -> None:
    assert response.status_code == status, response.text
    if status == 200:
        return
    body = response.json()
    assert set(body) == {"type", "error", "request_id"} and body["type"] == "error"
    assert response.headers["request-id"] == body["request_id"]
    assert set(body["error"]) == {"type", "message"} and body["error"]["type"] == TYPES[status]
    assert body["error"]["message"].startswith(begins) and body["error"]["message"], body


def test_there_are_enough() -> None:
    assert len(ROWS) > 80


@pytest.mark.parametrize("part", every(2, range(4)))
def test_what_is_wrong_is_refused(server: Server, part: int) -> None:
    for fields, status, begins in ROWS[part::4]:
        body = {"messages": QUESTION, "max_tokens": 2, **fields}
        require_error(server.post(PATH, body), status, begins)
        if not {"max_tokens", "stop_sequences", "output_config"} & set(fields):
            counted = server.post(f"{PATH}/count_tokens", body)
            assert counted.status_code == status or begins.startswith(("prompt", "thinking"))
    server.lives()


def test_bodies_and_all_else(server: Server) -> None:
    for body in BODIES:
        require_error(server.post(PATH, body), 400)
    whole = json.dumps({"messages": QUESTION, "max_tokens": 2}).encode()
    for headers, status in (
        ({"content-type": "text/plain"}, 415),
        ({"host": "evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"content-length": str(2**30)}, 413),
    ):
        sent = {"content-type": "application/json", **headers}
        require_error(server.post(PATH, content=whole, headers=sent), status)
    require_error(server.get(PATH), 405)
    require_error(server.post(f"{PATH}/batches"), 404)
    # Only what is of this API has its form.
    assert set(server.post("/v1/messagesx").json()) == {"error"}
    ours = {"anthropic-version": "2023-06-01", "anthropic-beta": "a,b"}
    require_error(server.post(PATH + "?beta=true", whole, headers=ours), 200)
    server.lives()


def test_keys_of_both_kinds() -> None:
    asked = {"messages": QUESTION, "max_tokens": 2}
    with serving(access=Access(key="k")) as server:
        for headers, status in (
            ({}, 401),
            ({"x-api-key": "x"}, 401),
            ({"x-api-key": "k"}, 200),
            ({"authorization": "Bearer k"}, 200),
        ):
            require_error(server.post(PATH, asked, headers=headers), status)


def test_a_full_queue_a_drained_server_and_a_broken_stream() -> None:
    asked = {"messages": QUESTION, "max_tokens": 1500, "stream": True}
    with serving(limits=EngineLimits(running=1, waiting=0)) as server:

        async def play() -> tuple[Any, Client]:
            first = Client(server, {"messages": QUESTION, "stream": True, **LONG})
            second = Client(server, asked, PATH)
            call = asyncio.create_task(first.call())
            await first.something.wait()
            refused = await server.ask("POST", PATH, json=asked)
            first.leave()
            await call
            while server.engine._running:
                await asyncio.sleep(0.001)
            call = asyncio.create_task(second.call())
            await second.something.wait()
            server.engine.end_all(ApiError(500, "broken"))
            await call
            return refused, second

        refused, broken = server.run(play())
        require_error(refused, 429)
        assert "retry-after" in refused.headers
        name, data = broken.data.decode().strip().split("\n\n")[-1].split("\n")
        assert name == "event: error"
        error = json.loads(data.removeprefix("data: "))
        assert error["error"] == {"type": "api_error", "message": "broken"}
        assert (b"request-id", error["request_id"].encode()) in broken.sent[0]["headers"]
        wait_until_idle(server)
        server.engine.drain()
        refused = server.post(PATH, asked)
        require_error(refused, 503)
        assert "retry-after" in refused.headers and refused.headers["x-should-retry"] == "false"
