"""Anthropic's client for Python, with its own types: text, tools, thoughts, schemas, errors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from apertus_mlx.server.engine import EngineLimits
from apertus_mlx.server.security import Access
from tests.server.running import ANSWER, QUESTION, serving
from tests.server.scripted import ScriptedServer, scripted
from tests.server.test_messages import (
    CALL_TEXT,
    CALLS,
    CALLS_END,
    END,
    THOUGHT,
    THOUGHT_END,
    TOOLS,
    turn,
)
from tests.server.wire import Wire

anthropic = pytest.importorskip("anthropic")
pytestmark = pytest.mark.nightly


class Port:
    """A scripted model behind a port, and a client of it."""

    def __init__(self, double: ScriptedServer) -> None:
        self.double = double
        self.wire = Wire(double.server)
        self.client = client(self.wire)

    def ask(self, *said: str | int, **fields: Any) -> Iterator[Any]:
        """The message, whole and as the client puts it together."""
        given = {"model": "default", "max_tokens": 100, "messages": QUESTION, **fields}
        self.double.say(*said)
        yield self.client.messages.create(**given)
        with self.client.messages.stream(**given) as stream:
            yield stream.get_final_message()


def client(wire: Wire, key: str = "none", **more: Any) -> Any:
    base = f"http://127.0.0.1:{wire.port}"
    return anthropic.Anthropic(base_url=base, api_key=key, max_retries=0, **more)


@pytest.fixture(scope="module")
def port() -> Iterator[Port]:
    with scripted() as double:
        found = Port(double)
        yield found
        found.client.close()
        found.wire.close()


def test_text(port: Port) -> None:
    for message in port.ask("It is Paris.", END, system="Be brief.", stop_sequences=["zz"]):
        [block] = message.content
        assert isinstance(block, anthropic.types.TextBlock) and block.text == "It is Paris."
        assert message.stop_reason == "end_turn" and message.stop_sequence is None
        assert message.usage.output_tokens > 1
    for message in port.ask("It is Paris.", END, stop_sequences=[" Paris"]):
        assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", " Paris")
        assert message.content[0].text == "It is"
    counted = port.client.messages.count_tokens(model="default", messages=QUESTION)
    usage = message.usage
    assert counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens


def test_a_turn_with_thoughts_and_a_tool(port: Port) -> None:
    said = (THOUGHT, "Weather, so ask.", THOUGHT_END, "I ask.", CALLS, CALL_TEXT, CALLS_END)
    fields = {"tools": TOOLS, "thinking": {"type": "enabled", "budget_tokens": 50}}
    for message in list(port.ask(*said, **fields)):
        thinking, words, use = message.content
        assert isinstance(thinking, anthropic.types.ThinkingBlock)
        assert thinking.thinking == "Weather, so ask." and thinking.signature
        assert words.text == "I ask." and message.stop_reason == "tool_use"
        assert isinstance(use, anthropic.types.ToolUseBlock)
        assert (use.name, use.input) == ("weather", {"city": "Bern"})
        # The client's own objects go back as they are.
        result = {"type": "tool_result", "tool_use_id": use.id, "content": "Sun"}
        went_on = [*QUESTION, {"role": "assistant", "content": message.content},
                   turn("user", result)]  # fmt: skip
        for last in port.ask("Sun.", END, **{**fields, "messages": went_on}):
            assert [each.text for each in last.content] == ["Sun."]
            assert last.stop_reason == "end_turn"


def test_events_of_the_client(port: Port) -> None:
    port.double.say("It is", " Paris.", CALLS, CALL_TEXT, CALLS_END)
    given = {"model": "default", "max_tokens": 100, "messages": QUESTION, "tools": TOOLS}
    with port.client.messages.stream(**given) as stream:
        events = list(stream)
    texts = [each.text for each in events if each.type == "text"]
    assert "".join(texts) == "It is Paris." and len(texts) > 1
    inputs = [each.snapshot for each in events if each.type == "input_json"]
    assert inputs[-1] == {"city": "Bern"} and len(inputs) > 1
    assert events[-1].type == "message_stop"


def test_errors_are_the_clients_own() -> None:
    with serving(access=Access(key="k"), limits=EngineLimits(running=1)) as server:
        wire = Wire(server)
        try:
            found = client(wire, "k")
            given = {"model": "default", "max_tokens": 30, "messages": QUESTION}
            given["extra_body"] = {"temperature": 0}
            assert found.messages.create(**given).content[0].text == ANSWER
            bearer = anthropic.Anthropic(
                base_url=f"http://127.0.0.1:{wire.port}", auth_token="k", max_retries=0
            )
            assert bearer.messages.create(**given).content[0].text == ANSWER
            long = [{"role": "user", "content": "word " * 3000}]
            for change, kind, words in (
                ({"model": "claude-x"}, anthropic.NotFoundError, "not served here"),
                ({"messages": long}, anthropic.BadRequestError, "prompt is too long: "),
                ({"extra_body": {"n": 2}}, anthropic.BadRequestError, "is not supported"),
            ):
                with pytest.raises(kind, match=words) as caught:
                    found.messages.create(**{**given, **change})
                body = caught.value.body
                assert body["type"] == "error" and caught.value.request_id == body["request_id"]
                json.dumps(body)
            with pytest.raises(anthropic.AuthenticationError):
                client(wire, "x").messages.create(**given)
            server.engine.drain()
            with pytest.raises(anthropic.InternalServerError) as caught:
                found.messages.create(**given)
            assert caught.value.response.headers["retry-after"]
        finally:
            wire.close()
