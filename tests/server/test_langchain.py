"""LangChain's client for OpenAI, beside a running server."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
from pydantic import BaseModel, ConfigDict

from tests.server.process import Process
from tests.server.running import ANSWER, QUESTION
from tests.server.scripted_port import scripted_port
from tests.server.test_page import PAGE

langchain_core = pytest.importorskip("langchain_core")
langchain = pytest.importorskip("langchain_openai")
pytestmark = pytest.mark.nightly
CALLS, CALLS_END, END = 71, 72, 68
TWO_CALLS = '[{"Place": {"days": 2, "quiet": true}}, {"Place": {"days": 3, "quiet": false}}]'


class Place(BaseModel):
    """A place and how many days to stay."""

    model_config = ConfigDict(extra="forbid")
    days: int
    quiet: bool


@pytest.fixture(scope="module")
def process() -> Iterator[Process]:
    found = Process()
    yield found
    assert found.end() == 0
    assert not any("Traceback" in line for line in found.lines), found.lines


def client(base: str, **fields: Any) -> Any:
    # Until the model is loaded there are 503 with Retry-After.
    given = {"temperature": 0, "max_retries": 20, "model": "default", **fields}
    return langchain.ChatOpenAI(base_url=base, api_key="none", **given)


def test_it_asks_and_streams(process: Process) -> None:
    model = client(process.base)
    answer = model.invoke(QUESTION)
    assert answer.content == ANSWER and answer.response_metadata["finish_reason"] == "stop"
    assert answer.usage_metadata["input_tokens"] > 0
    chunks = list(client(process.base, stream_usage=True).stream(QUESTION))
    assert "".join(chunk.content for chunk in chunks) == ANSWER and len(chunks) > 2
    told = [chunk.usage_metadata for chunk in chunks if chunk.usage_metadata]
    assert told[-1]["output_tokens"] == answer.usage_metadata["output_tokens"]
    assert [each.content for each in model.batch([QUESTION] * 3)] == [ANSWER] * 3
    assert asyncio.run(model.ainvoke(QUESTION)).content == ANSWER


def test_the_example_of_the_page(process: Process, capsys: pytest.CaptureFixture[str]) -> None:
    [code] = re.findall(r"```python\n(from langchain.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    client(process.base).invoke(QUESTION)
    exec(code.replace("http://127.0.0.1:8080/v1", process.base), {})  # noqa: S102
    assert "France" in capsys.readouterr().out


def test_its_options(process: Process) -> None:
    model = client(process.base, temperature=1, seed=3, n=2, max_tokens=5, stop=["zzz"], top_p=0.9)
    [answers] = model.generate([[langchain_core.messages.HumanMessage("Hi")]]).generations
    assert len(answers) == 2
    told = client(process.base, logprobs=True, top_logprobs=2).invoke(QUESTION)
    tokens = told.response_metadata["logprobs"]["content"]
    assert "".join(each["token"] for each in tokens) == ANSWER
    begun = [*QUESTION, {"role": "assistant", "content": ANSWER}, *QUESTION]
    assert client(process.base).invoke([("system", "Be brief."), *begun]).content


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
@pytest.mark.parametrize("include_raw", [False, True])
def test_structured_output(process: Process, method: str, include_raw: bool) -> None:
    model = client(process.base, temperature=1, seed=1, max_tokens=200)
    asking = model.with_structured_output(Place, method=method, include_raw=include_raw)
    found = asking.invoke(QUESTION)
    assert isinstance(found["parsed"] if include_raw else found, Place)
    streamed = list(asking.stream(QUESTION))
    parsed = [each.get("parsed") for each in streamed] if include_raw else streamed
    assert any(isinstance(each, Place) for each in parsed)


@pytest.mark.parametrize("choice", ["any", "Place", True])
def test_forced_calls(process: Process, choice: Any) -> None:
    model = client(process.base, temperature=1, seed=2, max_tokens=200)
    forced = model.bind_tools([Place], tool_choice=choice, parallel_tool_calls=False)
    [call] = forced.invoke(QUESTION).tool_calls
    assert call["name"] == "Place" and call["id"]
    jsonschema.validate(call["args"], Place.model_json_schema())
    whole = None
    for chunk in forced.stream(QUESTION):
        whole = chunk if whole is None else whole + chunk
    assert whole is not None and whole.tool_calls[0]["args"] == call["args"]


def test_a_call_and_its_result() -> None:
    """What it sends back of a call is what the server takes."""
    with scripted_port() as port:
        port.answers = [
            [CALLS, TWO_CALLS, CALLS_END],
            ["Two days.", END],
        ]
        model = client(port.base).bind_tools([Place])
        asked = model.invoke(QUESTION)
        assert [each["args"]["days"] for each in asked.tool_calls] == [2, 3]
        results = [
            {"role": "tool", "tool_call_id": each["id"], "content": "yes"}
            for each in asked.tool_calls
        ]
        assert model.invoke([*QUESTION, asked, *results]).content == "Two days."


def test_a_refusal_has_its_reason(process: Process) -> None:
    import openai

    with pytest.raises(openai.BadRequestError, match="is not supported"):
        client(process.base, extra_body={"guided_regex": "a"}).invoke(QUESTION)
    image = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]
    with pytest.raises(openai.BadRequestError, match="image_url"):
        client(process.base).invoke([{"role": "user", "content": image}])
