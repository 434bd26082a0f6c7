"""/v1/messages: the prompt is that of the same chat, the answer is told in Anthropic's blocks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest

from apertus_mlx.server.chat_completions import read_chat
from apertus_mlx.server.errors import ApiError
from apertus_mlx.server.messages import read_message_request
from tests.server.running import ANSWER, QUESTION, Server
from tests.server.scripted import ScriptedServer, scripted

END, THOUGHT, THOUGHT_END, CALLS, CALLS_END = 68, 69, 70, 71, 72
PATH = "/v1/messages"
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [{"name": "weather", "description": "Of a city.", "input_schema": SCHEMA}]
CHAT_TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "Of a city.",
                                      "parameters": SCHEMA}}
]  # fmt: skip
CALL_TEXT = '[{"weather": {"city": "Bern"}}]'
USE = {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Bern"}}
CHAT_CALL = {"id": "toolu_1", "type": "function",
             "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}  # fmt: skip


def text(words: str, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": words, **more}


def result(content: Any, **more: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": "toolu_1", "content": content, **more}


def turn(role: str, *blocks: Any) -> dict[str, Any]:
    return {"role": role, "content": list(blocks)}


def ask(server: Server, **fields: Any) -> dict[str, Any]:
    body = {"messages": QUESTION, "max_tokens": 60, "temperature": 0, **fields}
    response = server.post(PATH, body)
    assert response.status_code == 200, response.text
    assert response.headers["request-id"].startswith("req_")
    found: dict[str, Any] = response.json()
    return found


def stream(server: Server, **fields: Any) -> list[dict[str, Any]]:
    """The events of a stream, whose names are the types of their data."""
    body = {"messages": QUESTION, "max_tokens": 60, "temperature": 0, "stream": True, **fields}
    response = server.post(PATH, body)
    assert response.headers["content-type"].startswith("text/event-stream")
    events = []
    for part in response.text.strip().split("\n\n"):
        if part.startswith(":"):
            assert not events
            continue
        name, data = part.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


def put_together(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that the documented events make, in their documented order."""
    assert events[0]["type"] == "message_start" and events[-1]["type"] == "message_stop"
    message: dict[str, Any] = events[0]["message"]
    opened, parts = -1, ""
    for event in events[1:-1]:
        kind = event["type"]
        if kind == "content_block_start":
            assert opened == -1 and event["index"] == len(message["content"])
            opened, parts = event["index"], ""
            message["content"].append(dict(event["content_block"]))
        elif kind == "content_block_delta":
            assert event["index"] == opened
            block, delta = message["content"][opened], event["delta"]
            if delta["type"] == "input_json_delta":
                parts += delta["partial_json"]
            else:
                key = delta["type"].removesuffix("_delta")
                block[key] += delta[key]
        elif kind == "content_block_stop":
            assert event["index"] == opened
            if message["content"][opened]["type"] == "tool_use":
                message["content"][opened]["input"] = json.loads(parts)
            opened = -1
        elif kind == "message_delta":
            assert opened == -1
            message |= event["delta"]
            message["usage"] = event["usage"]
        else:
            assert kind == "ping"
    return message


@pytest.fixture(scope="module")
def double() -> Iterator[ScriptedServer]:
    with scripted() as found:
        yield found
        found.server.lives()


CONVERSATIONS: tuple[tuple[dict[str, Any], list[dict[str, Any]]], ...] = (
    ({"messages": QUESTION}, QUESTION),
    ({"messages": QUESTION, "system": "Be brief."},
     [{"role": "system", "content": "Be brief."}, *QUESTION]),
    ({"messages": [turn("user", text("A", cache_control={"type": "ephemeral"}), text("B"))],
      "system": [text("x-anthropic-billing-header: cch=1;"), text("Be"), text("brief.")]},
     [{"role": "system", "content": "Be\n\nbrief."}, {"role": "user", "content": "A\n\nB"}]),
    # In place, not at the head.
    ({"messages": [turn("system", text("Now.")), *QUESTION], "system": "S"},
     [{"role": "system", "content": "S"}, {"role": "user", "content": "Now."}, *QUESTION]),
    ({"messages": [*QUESTION, turn("assistant", text("It is"), text(" Paris.")), *QUESTION]},
     [*QUESTION, {"role": "assistant", "content": "It is Paris."}, *QUESTION]),
    ({"messages": [*QUESTION, turn("assistant", {"type": "redacted_thinking", "data": "x"},
                                   text("Let me see."), USE),
                   turn("user", result([text("5"), text("6")]), text("Well?"))], "tools": TOOLS},
     [*QUESTION, {"role": "assistant", "content": "Let me see.", "tool_calls": [CHAT_CALL]},
      {"role": "tool", "tool_call_id": "toolu_1", "content": "5\n\n6"},
      {"role": "user", "content": "Well?"}]),
    ({"messages": [*QUESTION, turn("assistant", USE), turn("user", result("no", is_error=True))],
      "tools": TOOLS},
     [*QUESTION, {"role": "assistant", "content": None, "tool_calls": [CHAT_CALL]},
      {"role": "tool", "tool_call_id": "toolu_1", "content": "Error: no"}]),
    ({"messages": [*QUESTION, turn("assistant", {"type": "thinking", "thinking": "Hm.",
                                                 "signature": "s"}, USE),
                   turn("user", result(None))], "tools": TOOLS, "thinking": {"type": "adaptive"}},
     [*QUESTION, {"role": "assistant", "reasoning_content": "Hm.", "tool_calls": [CHAT_CALL]},
      {"role": "tool", "tool_call_id": "toolu_1", "content": ""}]),
)  # fmt: skip


@pytest.mark.parametrize(("body", "chat"), CONVERSATIONS)
def test_the_prompt_is_that_of_the_same_chat(server: Server, body: Any, chat: Any) -> None:
    given = {"messages": chat, "tools": CHAT_TOOLS if "tools" in body else None}
    given["reasoning_effort"] = "high" if "thinking" in body else None
    wanted = server.post("/apply-template", given)
    assert wanted.status_code == 200, wanted.text
    prompt = read_message_request({**body, "max_tokens": 5}, server.model).task.prompt
    assert list(prompt) == wanted.json()["tokens"]
    counted = server.post(f"{PATH}/count_tokens", body).json()
    assert counted == {"input_tokens": len(prompt)}


def test_a_last_message_of_the_assistant_is_gone_on_with(server: Server) -> None:
    begun = [*QUESTION, {"role": "assistant", "content": "The capital of"}]
    [block] = ask(server, messages=begun)["content"]
    assert "The capital of" + block["text"] == ANSWER


def test_text_and_why_it_ended(server: Server) -> None:
    for fields, words, reason, sequence in (
        ({}, ANSWER, "end_turn", None),
        ({"max_tokens": 2}, None, "max_tokens", None),
        ({"stop_sequences": ["zzz", " of Fr"]}, "The capital", "stop_sequence", " of Fr"),
    ):
        whole = ask(server, **fields)
        told = put_together(stream(server, **fields))
        assert whole["id"] != told["id"] and whole["id"].startswith("msg_")
        assert whole["content"] == told["content"]
        if words is not None:
            assert whole["content"] == [{"type": "text", "text": words}]
        for each in (whole, told):
            assert (each["stop_reason"], each["stop_sequence"]) == (reason, sequence)


def test_usage_adds_up_to_the_prompt(server: Server) -> None:
    asked = {"messages": [turn("user", text("Which city has the most bridges?"))]}
    prompt = server.post(f"{PATH}/count_tokens", asked).json()["input_tokens"]
    first, events = ask(server, **asked)["usage"], stream(server, **asked)
    assert events[0]["message"]["usage"] | {"output_tokens": 0} == events[-2]["usage"] | {
        "output_tokens": 0
    }
    for usage in (first, events[-2]["usage"]):
        read = usage["cache_read_input_tokens"]
        assert usage["input_tokens"] + read + usage["cache_creation_input_tokens"] == prompt
        assert usage["output_tokens"] == first["output_tokens"] > 1
    assert read == prompt - 1 > first["cache_read_input_tokens"]


def test_thoughts_text_and_calls(double: ScriptedServer) -> None:
    double.say(THOUGHT, "Weather, so ask.", THOUGHT_END, "I ask.", CALLS, CALL_TEXT, CALLS_END)
    fields = {"tools": TOOLS, "thinking": {"type": "enabled", "budget_tokens": 50}}
    whole = ask(double.server, **fields)
    events = stream(double.server, **fields)
    told = put_together(events)
    for each in (whole, told):
        thinking, words, use = each["content"]
        assert thinking == {"type": "thinking", "thinking": "Weather, so ask.",
                            "signature": "unsigned"}  # fmt: skip
        assert words == {"type": "text", "text": "I ask."}
        assert use.pop("id").startswith("toolu_")
        assert use == {"type": "tool_use", "name": "weather", "input": {"city": "Bern"}}
        assert each["stop_reason"] == "tool_use"
    starts = [each["content_block"] for each in events if each["type"] == "content_block_start"]
    deltas = [each["delta"] for each in events if each["type"] == "content_block_delta"]
    assert [each["type"] for each in starts] == ["thinking", "text", "tool_use"]
    assert starts[2]["input"] == {}
    parts = [each["partial_json"] for each in deltas if each["type"] == "input_json_delta"]
    assert len(parts) > 1 and "".join(parts) == '{"city": "Bern"}'
    kinds = [each["type"] for each in events]
    assert kinds[:3] == ["message_start", "content_block_start", "ping"]
    hidden = {**fields, "thinking": {**fields["thinking"], "display": "omitted"}}
    for each in (ask(double.server, **hidden), put_together(stream(double.server, **hidden))):
        assert each["content"][0]["thinking"] == "" and len(each["content"]) == 3


def test_a_call_that_is_cut_is_left_out_of_the_whole(double: ScriptedServer) -> None:
    double.say("I ask.", CALLS, CALL_TEXT[:-6])
    answer = ask(double.server, tools=TOOLS, max_tokens=len(double.model.script))
    assert [each["type"] for each in answer["content"]] == ["text"]
    assert answer["stop_reason"] == "max_tokens"


@pytest.mark.parametrize("certain", [True, False])
def test_what_is_no_call_is_never_told_as_one(
    double: ScriptedServer, monkeypatch: pytest.MonkeyPatch, certain: bool
) -> None:
    """Without a grammar a model may write what only looks like a call at first."""
    if not certain:
        from apertus_mlx.generation import tool_grammar

        monkeypatch.setattr(tool_grammar, "has_engine", lambda: False)
    for said, kinds in ((CALL_TEXT, ["tool_use"]), ('[{"weather": {"a" 5}}]', ["text"])):
        if certain and kinds == ["text"]:
            continue  # the grammar does not let it
        double.say(CALLS, said, CALLS_END)
        told = put_together(stream(double.server, tools=TOOLS))
        whole = ask(double.server, tools=TOOLS)
        assert [each["type"] for each in told["content"]] == kinds
        assert [each["type"] for each in whole["content"]] == kinds


def test_choices_and_schemas_are_those_of_the_same_chat(server: Server) -> None:
    tools = [{**TOOLS[0], "strict": True, "type": "custom", "cache_control": {"type": "ephemeral"}}]
    named = {"type": "function", "function": {"name": "weather"}}
    for choice, chat_choice in (
        (None, None), ({"type": "auto"}, "auto"), ({"type": "none"}, "none"),
        ({"type": "any"}, "required"), ({"type": "tool", "name": "weather"}, named),
    ):  # fmt: skip
        for alone in (False, True) if choice else (False,):
            given = choice and {**choice, "disable_parallel_tool_use": alone}
            body = {"messages": QUESTION, "max_tokens": 5, "tools": tools, "tool_choice": given}
            found = read_message_request(body, server.model).task
            chat = {"messages": QUESTION, "tools": CHAT_TOOLS, "tool_choice": chat_choice}
            wanted = read_chat({**chat, "parallel_tool_calls": not alone}, server.model).task
            assert found.tools is not None and wanted.tools is not None
            assert found.tools.grammar == wanted.tools.grammar
            assert found.tools.must_call == wanted.tools.must_call
            assert found.tool_names == wanted.tool_names and found.prompt == wanted.prompt
    form = {"type": "json_schema", "schema": SCHEMA}
    asked = {"messages": QUESTION, "max_tokens": 60, "temperature": 0}
    answer = ask(server, **asked, output_config={"format": form, "effort": "low"})
    chat_form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    wanted = server.chat(**asked, response_format=chat_form).json()["choices"][0]["message"]
    assert answer["content"] == [{"type": "text", "text": wanted["content"]}]
    assert wanted["content"].lstrip().startswith("{")


def test_thinking_is_bounded_and_may_be_left_to_the_model(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def task(kind: str, **more: Any) -> Any:
        body = {"messages": QUESTION, "max_tokens": 60, "thinking": {"type": kind, **more}}
        return read_message_request({**body, "tools": TOOLS}, server.model).task

    found = task("enabled", budget_tokens=7)
    assert found.think and found.options.max_thought_tokens == 7
    assert task("adaptive").think and not task("disabled").think
    template = server.model.folder.template
    assert template is not None
    # A template that cannot write both.
    monkeypatch.setitem(template._form.__dict__, "encloses_results", True)
    assert not task("adaptive").think
    with pytest.raises(ApiError, match="not both"):
        task("enabled", budget_tokens=7)


def test_bodies_and_answers_are_as_described(server: Server, double: ScriptedServer) -> None:
    told = server.get("/openapi.json").json()

    def validator(schema: Any) -> Any:
        return jsonschema.Draft202012Validator({**schema, "components": told["components"]})

    content = told["paths"][PATH]["post"]["requestBody"]["content"]
    body = validator(content["application/json"]["schema"])
    for given, _ in CONVERSATIONS:
        body.validate({**given, "max_tokens": 5, "metadata": {"user_id": "x"}})
    names = {name: validator({"$ref": f"#/components/schemas/{name}"})
             for name in ("Message", "MessageEvent", "MessageError")}  # fmt: skip
    double.say(THOUGHT, "So.", THOUGHT_END, "I ask.", CALLS, CALL_TEXT, CALLS_END)
    fields = {"tools": TOOLS, "thinking": {"type": "adaptive"}}
    names["Message"].validate(ask(double.server, **fields))
    events = {each["type"]: each for each in stream(double.server, **fields)}
    assert len(events) == 7
    for event in events.values():
        names["MessageEvent"].validate(event)
    names["MessageError"].validate(server.post(PATH, {}).json())
