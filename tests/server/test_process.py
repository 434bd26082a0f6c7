"""A real process, with the openai client: answers, streams, the page's example, SIGTERM."""

from __future__ import annotations

import json
import re
import resource
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

from apertus_mlx.cli import serve as serve_module
from apertus_mlx.cli.serve import serve
from apertus_mlx.errors import UsageError
from apertus_mlx.generation.options import RunOptions
from apertus_mlx.server.engine import Engine
from apertus_mlx.server.options import ServeOptions
from tests.server.process import Process
from tests.server.running import ANSWER, QUESTION

PAGE = Path(__file__).parents[2] / "docs/server.md"


@pytest.fixture(scope="module")
def process() -> Iterator[Process]:
    found = Process("--alias", "small")
    yield found
    assert found.end() == 0
    assert not any("Traceback" in line for line in found.lines), found.lines


def test_the_openai_client(process: Process) -> None:
    import openai

    client = process.client()
    asked: dict[str, Any] = {"model": "small", "messages": QUESTION, "temperature": 0}
    answer = client.chat.completions.create(**asked)
    assert answer.choices[0].message.content == ANSWER and answer.usage is not None
    chunks = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    said = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(said) == ANSWER and chunks[-1].usage == answer.usage.model_copy(
        update={"prompt_tokens_details": chunks[-1].usage.prompt_tokens_details}
    )
    assert [each.id for each in client.models.list()] == ["embedded"]
    text = client.completions.create(model="small", prompt="The capital of France", max_tokens=4,
                                     temperature=0)  # fmt: skip
    assert text.choices[0].text == " is Paris."
    for fields, kind, param in (
        ({"temperature": -1}, openai.BadRequestError, "temperature"),
        ({"model": "gpt-4"}, openai.NotFoundError, "model"),
        ({"extra_body": {"unknown": 1}}, openai.BadRequestError, "unknown"),
    ):
        with pytest.raises(kind) as refused:
            client.chat.completions.create(**{**asked, **fields})
        assert refused.value.param == param  # type: ignore[attr-defined]


def test_the_client_reads_schemas_and_calls(process: Process) -> None:
    from pydantic import BaseModel

    class Place(BaseModel):
        days: int

    client = process.client()
    asked: dict[str, Any] = {"model": "small", "messages": QUESTION, "max_tokens": 60, "seed": 1}
    parsed = client.chat.completions.parse(**asked, response_format=Place)
    assert isinstance(parsed.choices[0].message.parsed, Place)
    tool = {"type": "function", "function": {"name": "now", "description": "Time"}}
    with client.chat.completions.stream(
        **asked, tools=[tool], tool_choice="required", parallel_tool_calls=False
    ) as stream:
        final = stream.get_final_completion()
    [call] = final.choices[0].message.tool_calls
    assert call.function.name == "now" and json.loads(call.function.arguments) == {}


def test_the_example_of_the_page(process: Process, capsys: pytest.CaptureFixture[str]) -> None:
    [code] = re.findall(r"```python\n(from openai.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    process.client().models.list()
    exec(code.replace(":8080", f":{process.port}"), {})  # noqa: S102
    assert "France" in capsys.readouterr().out


def test_how_many_at_once(process: Process) -> None:
    """By chip and format, unless `--parallel` says otherwise; these weights are not quantized."""
    with urlopen(f"http://127.0.0.1:{process.port}/v1/status") as response:
        assert json.load(response)["engine"]["most_running"] == 4


def test_a_port_in_use_and_hosts_without_a_key(process: Process) -> None:
    for options, words in (
        ({"port": process.port}, f"--port {process.port}"),
        ({"host": "0.0.0.0", "port": 0}, "key"),  # noqa: S104
    ):
        with pytest.raises(UsageError, match=words):
            serve(serving=ServeOptions(**options), settings=RunOptions())


def test_sigterm_as_soon_as_it_is_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends the server, though nothing is loaded and uvicorn does not run yet."""
    died: list[int] = []
    # What the process would die of.
    before = signal.signal(signal.SIGTERM, lambda sig, _: died.append(sig))
    start = Engine.start

    def announced(line: str) -> None:
        if line.startswith("serving "):
            signal.raise_signal(signal.SIGTERM)

    def starting(engine: Engine) -> None:
        assert engine.draining, "the signal was lost"
        start(engine)

    monkeypatch.setattr(serve_module, "note", announced)
    monkeypatch.setattr(Engine, "start", starting)
    try:
        serve(serving=ServeOptions(port=0), settings=RunOptions())
        assert not died
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.nightly
def test_sigterm_ends_what_does_not_end() -> None:
    import openai

    process = Process("--grace", "0")
    stream = process.client().completions.create(
        model="default", prompt="The", max_tokens=2000, temperature=0, stream=True,
        logit_bias={"2": -100, "68": -100, "72": -100},
    )  # fmt: skip
    next(iter(stream))
    codes: list[int] = []
    ending = threading.Thread(target=lambda: codes.append(process.end()))
    ending.start()
    with pytest.raises(openai.APIError, match="shutting down"):
        list(stream)
    ending.join()
    assert codes == [0]


def test_a_connection_that_says_nothing(process: Process) -> None:
    """Idle connections cost nothing that others need."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    idle = [socket.create_connection(("127.0.0.1", process.port)) for _ in range(1000)]
    try:
        answer = process.client().chat.completions.create(
            model="default", messages=QUESTION, temperature=0
        )
        assert answer.choices[0].message.content == ANSWER
    finally:
        for each in idle:
            each.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_sigterm_lets_an_answer_end(process: Process) -> None:
    """The last test: it ends the process of all others."""
    client = process.client()
    stream = client.completions.create(
        model="default", prompt="The", max_tokens=100, temperature=0, stream=True,
        logit_bias={"2": -100, "68": -100, "72": -100},
    )  # fmt: skip
    first = next(iter(stream))
    codes: list[int] = []
    ending = threading.Thread(target=lambda: codes.append(process.end()))
    ending.start()
    rest = list(stream)
    ending.join()
    assert codes == [0] and first.choices and rest[-1].choices[0].finish_reason == "length"
