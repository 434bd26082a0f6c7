"""The command `llm` with a server among its OpenAI models, as docs/server.md sets it up."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.process import Process
from tests.server.running import ANSWER
from tests.server.scripted_port import scripted_port

pytest.importorskip("llm")
pytestmark = pytest.mark.nightly
PAGE = Path(__file__).parents[2] / "docs/server.md"
QUESTION = "What is the capital of France?"
# Closed: the embedded model would go on with keys of its own.
SCHEMA = {
    "type": "object",
    "properties": {"days": {"type": "integer"}, "quiet": {"type": "boolean"}},
    "required": ["days", "quiet"],
    "additionalProperties": False,
}
CALLS, CALLS_END, END = 71, 72, 68


class Llm:
    """The command, with a folder of its own for settings and logs."""

    def __init__(self, folder: Path, base: str) -> None:
        [settings] = re.findall(
            r"```yaml\n(- model_id: apertus\n.*?)```", PAGE.read_text(), re.DOTALL
        )
        assert "http://127.0.0.1:8080/v1" in settings
        settings = settings.replace("http://127.0.0.1:8080/v1", base)
        (folder / "extra-openai-models.yaml").write_text(settings)
        self._folder = folder

    def __call__(self, *arguments: str, stdin: str = "") -> str:
        done = subprocess.run(
            [sys.executable, "-m", "llm", *arguments],
            input=stdin, capture_output=True, text=True, timeout=120, check=False,
            env={**os.environ, "LLM_USER_PATH": str(self._folder), "COLUMNS": "200"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()


@pytest.fixture(scope="module")
def process() -> Iterator[Process]:
    found = Process()
    # `llm` tries twice; until the model is loaded there are 503.
    found.client().completions.create(model="default", prompt="a", max_tokens=1)
    yield found
    assert found.end() == 0
    assert not any("Traceback" in line for line in found.lines), found.lines


@pytest.fixture
def llm(process: Process, tmp_path: Path) -> Llm:
    return Llm(tmp_path, process.base)


def test_a_prompt_whole_and_as_a_stream(llm: Llm) -> None:
    for how in ((), ("--no-stream",), ("--async",)):
        assert llm("-m", "apertus", "-o", "temperature", "0", *how, QUESTION) == ANSWER


def test_a_conversation_goes_on(llm: Llm) -> None:
    asked = ("-m", "apertus", "-o", "temperature", "0")
    llm(*asked, "-s", "Be brief.", QUESTION)
    assert llm(*asked, "-c", QUESTION)
    logged = json.loads(llm("logs", "--json", "-n", "2"))
    assert len({each["conversation_id"] for each in logged}) == 1
    said = llm("chat", "-m", "apertus", "-o", "temperature", "0", stdin=f"{QUESTION}\nexit\n")
    assert ANSWER in said


def test_its_options(llm: Llm) -> None:
    options = {
        "max_tokens": "4", "temperature": "0.5", "top_p": "0.9", "frequency_penalty": "0.1",
        "presence_penalty": "0.1", "stop": "zzz", "seed": "7", "logit_bias": '{"500": -5}',
    }  # fmt: skip
    given = [part for pair in options.items() for part in ("-o", *pair)]
    first, second = (llm("-m", "apertus", *given, QUESTION) for _ in range(2))
    assert first == second
    found = llm("-m", "apertus", "-o", "json_object", "1", "-o", "max_tokens", "200", "-o", "seed",
                "1", "In JSON.")  # fmt: skip
    assert found.startswith("{")


def test_a_schema_is_followed(llm: Llm) -> None:
    for how in ((), ("--no-stream",)):
        asked = ("-m", "apertus", *how, "-o", "seed", "1", "--schema", json.dumps(SCHEMA))
        found = json.loads(llm(*asked, QUESTION))
        assert set(found) == {"days", "quiet"} and isinstance(found["quiet"], bool)


def test_it_runs_a_tool_and_sends_back_the_result(tmp_path: Path) -> None:
    function = "def double(number: int) -> int:\n    'Twice a number'\n    return 2 * number\n"
    with scripted_port() as port:
        llm = Llm(tmp_path, port.base)
        for how in ((), ("--no-stream",)):
            port.answers = [
                [CALLS, '[{"double": {"number": 21}}]', CALLS_END], ["It is 42.", END],
            ]  # fmt: skip
            told = llm("-m", "apertus", "--functions", function, *how, "Twice 21?")
            assert told == "It is 42." and not port.answers
        logged = llm("logs", "--json", "-n", "1")
        assert '"output": "42"' in logged
