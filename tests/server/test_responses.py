"""/v1/responses with the openai client and its types: texts, tools, thoughts, schemas, errors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, get_args

import openai
import pydantic
import pytest
from openai.types.responses import Response, ResponseStreamEvent

from apertus_mlx.generation import tool_grammar
from apertus_mlx.server.errors import busy
from apertus_mlx.server.jobs import Failed, Told
from apertus_mlx.server.response_reply import ResponseReply
from apertus_mlx.server.response_store import ResponseStore
from apertus_mlx.server.responses import read_response
from apertus_mlx.text.pieces import CallPiece, Piece
from tests.server.running import ANSWER, QUESTION, Server, serving
from tests.server.scripted import ScriptedServer, scripted
from tests.server.test_conformance import (
    ARGUMENTS,
    CALL_TEXT,
    CALLS,
    CALLS_END,
    END,
    PARAMETERS,
    THOUGHT,
    THOUGHT_END,
)
from tests.server.wire import Wire

# The classes of events by the type that each has on the wire.
EVENTS = {get_args(each.model_fields["type"].annotation)[0]: each
          for each in get_args(get_args(ResponseStreamEvent)[0])}  # fmt: skip
PATH = "/v1/responses"
QUESTION_TEXT = QUESTION[0]["content"]
TOOLS = [{"type": "function", "name": "weather", "parameters": PARAMETERS, "strict": False}]
# As OpenAI documents the order of events.
BEGIN = ["created", "in_progress"]
TEXT = ["output_item.added", "content_part.added", "output_text.delta", "output_text.done",
        "content_part.done", "output_item.done"]  # fmt: skip
THOUGHTS = [each.replace("output_text", "reasoning_text") for each in TEXT]
CALL = ["output_item.added", "function_call_arguments.delta", "function_call_arguments.done",
        "output_item.done"]  # fmt: skip


@pytest.fixture(scope="module")
def double() -> Iterator[ScriptedServer]:
    with scripted() as found:
        yield found
        found.server.lives()


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    yield from connected(server)


@pytest.fixture(scope="module")
def scripted_client(double: ScriptedServer) -> Iterator[openai.OpenAI]:
    yield from connected(double.server)


def connected(server: Server) -> Iterator[openai.OpenAI]:
    wire = Wire(server)
    url = f"http://127.0.0.1:{wire.port}/v1"
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as found:
        yield found
    wire.close()


def events(server: Server, **fields: Any) -> list[dict[str, Any]]:
    """The events of a stream, each of which has its name and number and one of OpenAI's types."""
    response = server.post(PATH, {"temperature": 0, "stream": True, **fields})
    assert response.status_code == 200, response.text
    found = []
    for part in response.text.split("\n\n"):
        if part and not part.startswith(":"):
            name, data = part.split("\n")
            event = json.loads(data.removeprefix("data: "))
            assert name == f"event: {event['type']}"
            assert event["sequence_number"] == len(found)
            read = EVENTS[event["type"]].model_validate(event)
            assert read.model_dump(exclude_unset=True) == event
            found.append(event)
    return found


def order(found: list[dict[str, Any]]) -> list[str]:
    """The kinds of events, of equal ones in a row the first."""
    kinds = [each["type"].removeprefix("response.") for each in found]
    return [kind for i, kind in enumerate(kinds) if i == 0 or kinds[i - 1] != kind]


def plain(response: Any) -> Any:
    """A response without what differs from one to the next."""
    value = response if isinstance(response, dict) else response.to_dict()
    output = [{**each, "id": "", "call_id": ""} for each in value["output"]]
    return {**value, "id": "", "created_at": 0, "usage": None, "output": output}


def test_a_text(server: Server, client: openai.OpenAI) -> None:
    whole = client.responses.create(model="default", input=QUESTION_TEXT, temperature=0)
    assert whole.output_text == ANSWER and whole.status == "completed"
    raw = server.post(PATH, {"input": QUESTION_TEXT, "temperature": 0}).json()
    assert Response.model_validate(raw).model_dump(exclude_unset=True) == raw
    chat = server.chat().json()["usage"]
    usage = raw["usage"]
    assert usage["input_tokens"] == chat["prompt_tokens"]
    assert usage["output_tokens"] == chat["completion_tokens"]
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    told = events(server, input=QUESTION_TEXT)
    assert order(told) == [*BEGIN, *TEXT, "completed"]
    deltas = [each["delta"] for each in told if each["type"].endswith("text.delta")]
    assert len(deltas) > 3 and "".join(deltas) == ANSWER
    assert plain(told[-1]["response"]) == plain(raw)


def test_the_client_puts_a_stream_together(client: openai.OpenAI) -> None:
    with client.responses.stream(model="default", input=QUESTION_TEXT, temperature=0) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert kinds[0] == "response.created" and kinds[-1] == "response.completed"
    assert final.output_text == ANSWER
    assert client.responses.retrieve(final.id).output_text == ANSWER


def test_items_and_instructions_are_a_chat(server: Server) -> None:
    items = [
        {"role": "developer", "content": [{"type": "input_text", "text": "Be brief."}]},
        {"role": "user", "content": [{"type": "input_text", "text": "A"},
                                     {"type": "input_text", "text": "B"}]},
        {"type": "message", "role": "assistant",
         "content": [{"type": "output_text", "text": "C", "annotations": []}]},
        {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": ARGUMENTS},
        {"type": "function_call", "call_id": "c2", "name": "weather", "arguments": ARGUMENTS},
        {"type": "function_call_output", "call_id": "c2", "output": "sun"},
        {"type": "function_call_output", "call_id": "c1",
         "output": [{"type": "input_text", "text": "rain"}]},
    ]  # fmt: skip

    def call(name: str) -> dict[str, Any]:
        return {"id": name, "type": "function",
                "function": {"name": "weather", "arguments": ARGUMENTS}}  # fmt: skip

    messages = [
        {"role": "system", "content": "You help."},
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "AB"},
        {"role": "assistant", "content": "C", "tool_calls": [call("c1"), call("c2")]},
        {"role": "tool", "tool_call_id": "c2", "content": "sun"},
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
    ]
    body = {"input": items, "instructions": "You help.", "tools": TOOLS}
    ours = server.post(f"{PATH}/input_tokens", body).json()
    functions = [{"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}]
    chat = {"messages": messages, "tools": functions, "temperature": 0, "max_tokens": 1}
    asked = server.post("/v1/chat/completions", chat).json()["usage"]
    assert ours["input_tokens"] == asked["prompt_tokens"]
    again = server.post(PATH, {**body, "max_output_tokens": 1, "temperature": 0}).json()["usage"]
    # Had one token differed, the cache of the chat would end there.
    assert again["input_tokens_details"]["cached_tokens"] == asked["prompt_tokens"] - 1


@pytest.mark.parametrize("certain", [True, False])
def test_a_call_is_told_as_it_comes_where_it_is_sure_to_be_one(
    double: ScriptedServer, monkeypatch: pytest.MonkeyPatch, certain: bool
) -> None:
    if not certain:
        monkeypatch.setattr(tool_grammar, "has_engine", lambda: False)
    store = ResponseStore()
    asked = read_response(store, {"input": "a", "tools": TOOLS}, double.server.model)
    reply = ResponseReply("model", asked, store)
    told = [
        [event["type"] for event in reply.events(0, Told(0, Piece("", call=part)))]
        for part in (
            CallPiece(0, id="c1", name="weather"),
            CallPiece(0, arguments=ARGUMENTS[:5]),
            CallPiece(0, arguments=ARGUMENTS[5:]),
        )
    ]
    names = [f"response.{CALL[0]}", f"response.{CALL[1]}", f"response.{CALL[1]}"]
    assert told == ([[each] for each in names] if certain else [[], [], []])


@pytest.mark.parametrize("think", [False, True])
def test_a_call_and_its_result(
    double: ScriptedServer, scripted_client: openai.OpenAI, think: bool
) -> None:
    thought: list[Any] = [THOUGHT, "Look it up.", THOUGHT_END] if think else []
    double.say(*thought, CALLS, CALL_TEXT, CALLS_END)
    asked: dict[str, Any] = {
        "input": QUESTION_TEXT, "tools": TOOLS,
        "reasoning": {"effort": "high" if think else "none", "summary": "auto"},
        "include": ["reasoning.encrypted_content"], "store": False,
    }  # fmt: skip
    whole = scripted_client.responses.create(model="default", **asked)
    *before, found = whole.output
    assert found.type == "function_call" and (found.name, found.arguments) == ("weather", ARGUMENTS)
    assert [each.type for each in before] == ["reasoning"] * think
    if think:
        [part] = before[0].content or []  # type: ignore[union-attr]
        assert part.text == "Look it up."  # type: ignore[union-attr]
        assert whole.usage is not None and whole.usage.output_tokens_details.reasoning_tokens > 2
    told = events(double.server, **asked)
    assert order(told) == [*BEGIN, *(THOUGHTS if think else []), *CALL, "completed"]
    assert plain(told[-1]["response"])["output"] == plain(whole)["output"]
    deltas = [each["delta"] for each in told if "arguments.delta" in each["type"]]
    assert "".join(deltas) == ARGUMENTS
    double.say("Sunny.", END)
    result = {"type": "function_call_output", "call_id": found.call_id, "output": "sun"}
    items: Any = [{"role": "user", "content": QUESTION_TEXT},
                  *(each.to_dict() for each in whole.output), result]  # fmt: skip
    last = scripted_client.responses.create(
        model="default",
        input=items,
        tools=TOOLS,
        store=False,  # type: ignore[arg-type]
    )
    assert last.output_text == "Sunny."
    with pytest.raises(openai.NotFoundError):
        scripted_client.responses.retrieve(last.id)


def test_two_calls_are_two_items(double: ScriptedServer) -> None:
    double.say(CALLS, f"[{CALL_TEXT[1:-1]}, {CALL_TEXT[1:-1]}]", CALLS_END)
    told = events(double.server, input=QUESTION_TEXT, tools=TOOLS, max_output_tokens=200)
    assert order(told) == [*BEGIN, *CALL, *CALL, "completed"]
    items = [each["item"] for each in told if each["type"].endswith("item.done")]
    assert [each["arguments"] for each in items] == [ARGUMENTS] * 2
    assert len({each["call_id"] for each in items}) == 2
    assert [each["output_index"] for each in told if each["type"].endswith("item.done")] == [0, 1]


def test_a_malformed_call_is_text_and_no_item(
    double: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing holds the model to a form."""
    monkeypatch.setattr(tool_grammar, "has_engine", lambda: False)
    text = '[{"weather": {"city": "Bern"] oh'
    double.say(CALLS, text, END)
    functions = [{"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}]
    chat = {"messages": QUESTION, "tools": functions}
    # A chat's stream has told of the call when it turns out to be none.
    assert "tool_calls" in json.dumps(double.server.events("/v1/chat/completions", chat))
    told = events(double.server, input=QUESTION_TEXT, tools=TOOLS)
    assert not [each for each in told if "function_call" in json.dumps(each["type"])]
    [item] = told[-1]["response"]["output"]
    assert item["type"] == "message" and item["content"][0]["text"].endswith("oh")


def test_an_answer_that_is_cut(server: Server, double: ScriptedServer) -> None:
    told = events(server, input=QUESTION_TEXT, max_output_tokens=3)
    assert order(told) == [*BEGIN, *TEXT, "incomplete"]
    response = told[-1]["response"]
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert response["output"][0]["status"] == "incomplete"
    double.say(CALLS, CALL_TEXT, CALLS_END)
    for fields in ({}, {"stream": True}):
        body = {"input": "x", "tools": TOOLS, "max_output_tokens": 12, **fields}
        found = double.server.post(PATH, body)
        cut = found.json() if not fields else events(double.server, **body)[-1]["response"]
        assert cut["status"] == "incomplete"
        assert [each["status"] for each in cut["output"]] == ["incomplete"]


def test_an_empty_answer_has_a_message(double: ScriptedServer) -> None:
    double.say(END)
    told = events(double.server, input="x")
    assert order(told) == [*BEGIN, *(each for each in TEXT if "delta" not in each), "completed"]
    whole = double.server.post(PATH, {"input": "x"}).json()
    assert [part["text"] for each in whole["output"] for part in each["content"]] == [""]


class Verdict(pydantic.BaseModel):
    """What the answer of the next test is."""

    model_config = pydantic.ConfigDict(extra="forbid")
    right: bool


def test_a_schema(client: openai.OpenAI) -> None:
    found = client.responses.parse(
        model="default", input=QUESTION_TEXT, text_format=Verdict, temperature=0
    )
    assert isinstance(found.output_parsed, Verdict)
    assert set(json.loads(found.output_text)) == {"right"}


def test_errors_as_the_client_has_them(client: openai.OpenAI) -> None:
    ask = client.responses.create
    cases: tuple[tuple[dict[str, Any], type[openai.APIStatusError], str | None], ...] = (
        ({"temperature": -1}, openai.BadRequestError, "temperature"),
        ({"model": "gpt-5"}, openai.NotFoundError, "model"),
        ({"previous_response_id": "resp_x"}, openai.BadRequestError, "previous_response_id"),
        ({"tools": [{"type": "mcp"}]}, openai.BadRequestError, "tools[0].type"),
        ({"input": "word " * 2_500}, openai.BadRequestError, "input"),
    )
    for fields, kind, param in cases:
        with pytest.raises(kind) as met:
            ask(**{"model": "default", "input": "Hi", **fields})
        assert met.value.param == param
    for work in (client.responses.retrieve, client.responses.delete):
        with pytest.raises(openai.NotFoundError):
            work("resp_x")


def test_going_on_from_a_response(server: Server, client: openai.OpenAI) -> None:
    first = client.responses.create(
        model="default", input=QUESTION_TEXT, instructions="Be brief.", temperature=0,
        metadata={"a": "b"},
    )  # fmt: skip
    assert client.responses.retrieve(first.id).to_dict() == first.to_dict()
    second = client.responses.create(
        model="default", input="And?", previous_response_id=first.id, temperature=0
    )
    talk = [
        *QUESTION,
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "And?"},
    ]
    counted = server.post("/v1/chat/completions/input_tokens", {"messages": talk}).json()
    assert second.usage is not None and second.usage.input_tokens == counted["input_tokens"]
    assert second.previous_response_id == first.id and second.instructions is None
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)
    with pytest.raises(openai.BadRequestError) as met:
        client.responses.create(model="default", input="x", previous_response_id=first.id)
    assert met.value.code == "previous_response_not_found"
    assert client.responses.retrieve(second.id).id == second.id


def test_an_error_in_a_stream_ends_it(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    from apertus_mlx.server.outbox import RequestOutbox

    async def failing(*_: Any) -> Any:
        return 0, Failed(busy(429, "too many", "queue_full"))

    monkeypatch.setattr(RequestOutbox, "get", failing)
    told = events(server, input="x")
    assert order(told) == [*BEGIN, "failed"]
    assert told[-1]["response"]["error"] == {"code": "rate_limit_exceeded", "message": "too many"}


def test_what_is_kept_is_bounded() -> None:
    store = ResponseStore(most=2, most_bytes=190)

    def keep(name: str, text: str = "") -> None:
        store.keep({"id": name}, [text])

    for name in "abc":
        keep(name)
    assert len(store) == 2 and store.get("c").response == {"id": "c"}
    keep("large", "x" * 300)
    assert len(store) == 2
    keep("d", "x" * 160)
    assert len(store) == 1 and store.nbytes <= 190
    store.drop("d")
    assert len(store) == store.nbytes == 0


def test_responses_are_dropped_by_their_number() -> None:
    with serving(responses=ResponseStore(most=1)) as server:
        first, second = (
            server.post(PATH, {"input": "Hi", "max_output_tokens": 1}).json()["id"]
            for _ in range(2)
        )
        codes = [server.get(f"{PATH}/{each}").status_code for each in (first, second)]
    assert codes == [404, 200]
