"""An output filter on answers: of a run, a chat, the command line and the Python API."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from apertus_mlx.api import load
from apertus_mlx.cli.chat import chat
from apertus_mlx.cli.generate import generate
from apertus_mlx.errors import NotFoundError, UsageError
from apertus_mlx.generation.conversation import Conversation
from apertus_mlx.generation.model_folder import open_folder
from apertus_mlx.generation.options import RunOptions, SamplingOptions
from apertus_mlx.hub.demo import model_dir
from apertus_mlx.text.output_filter import load_output_filter

QUESTION = "What is the capital of France?"
ANSWER = "The capital of France is Paris."
FILTERED = "The capital of France is [city]."
GREEDY = SamplingOptions(temperature=0)
DOCS = Path(__file__).parents[2] / "docs/output-filter.md"


@pytest.fixture
def rules(tmp_path: Path) -> Path:
    path = tmp_path / "rules.json"
    path.write_text('{"rules": [{"texts": ["Paris", "Bern"], "replacement": "[city]"}]}')
    return path


def test_the_command_line(rules: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generate(QUESTION, output_filter=str(rules), sampling=GREEDY, settings=RunOptions())
    assert capsys.readouterr().out == FILTERED + "\n"
    generate(QUESTION, output_filter=str(rules), sampling=GREEDY, settings=RunOptions(), json=True)
    report = json.loads(capsys.readouterr().out)
    assert (report["text"], report["token_ids"]) == (FILTERED, [])
    assert report["generated_tokens"] > 5
    for command in (
        lambda: generate(QUESTION, output_filter="absent", sampling=GREEDY, settings=RunOptions()),
        lambda: chat(output_filter="absent", sampling=GREEDY, settings=RunOptions()),
    ):
        with pytest.raises(NotFoundError, match="absent"):
            command()
    assert capsys.readouterr().out == ""


def test_the_python_api(rules: Path) -> None:
    with load(output_filter=rules) as model:
        answer = model.generate(QUESTION, temperature=0)
        assert answer.text == FILTERED
        assert model.decode(answer.token_ids).strip() == ANSWER
        assert "".join(piece.text for piece in model.stream(QUESTION, temperature=0)) == FILTERED
        talk = model.chat(temperature=0)
        assert talk.ask(QUESTION).text == FILTERED
        assert talk.messages[-1]["content"] == FILTERED
        with pytest.raises(UsageError, match="output filter"):
            model.logprobs("Paris")
    with pytest.raises(TypeError, match="output_filter: expected"):
        load(output_filter=1)  # type: ignore[arg-type]


def test_a_chat_goes_on_with_what_was_shown(rules: Path) -> None:
    plain = open_folder(model_dir()).load()
    loaded = replace(plain, output_filter=load_output_filter(rules))
    talk = Conversation(loaded)
    assert "".join(piece.text for piece in talk.ask(QUESTION, GREEDY)) == FILTERED
    list(talk.ask(QUESTION, GREEDY))
    assert talk.run is not None
    prompt = talk.run.answer.prompt_token_ids
    assert "[city]" in plain.folder.tokenizer.decode(prompt)
    assert "Paris" not in plain.folder.tokenizer.decode(prompt)


def test_the_examples_of_the_page(
    rules: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(rules.parent)
    names: dict[str, object] = {}
    for code in re.findall(r"```python\n(.*?)```", DOCS.read_text("utf-8"), re.DOTALL):
        exec(code, names)  # noqa: S102
    assert capsys.readouterr().out == f"{FILTERED}\n{ANSWER.upper()}\n"
