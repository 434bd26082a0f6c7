"""Tool calls in a run's answer: what it holds, how it ends, what the command line prints."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from apertus_mlx.cli.generate import generate
from apertus_mlx.cli.output import print_pieces
from apertus_mlx.generation import run as module
from apertus_mlx.generation.model_folder import LoadedModel, open_folder
from apertus_mlx.generation.options import RunOptions, SamplingOptions
from apertus_mlx.generation.run import Answer, Generation, Piece, ToolCall
from apertus_mlx.hub.demo import model_dir
from apertus_mlx.text.pieces import CallPiece

CALLS = '[{"f": {"a": "é"}}, {"g": {}}]'
Script = Callable[[str], list[int]]


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return open_folder(model_dir()).load()


@pytest.fixture
def says(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> Script:
    """Makes the model draw the ids of a text in which `⟨71⟩` is an id; returns them."""

    def script(text: str) -> list[int]:
        ids: list[int] = []
        for index, part in enumerate(text.replace("⟩", "⟨").split("⟨")):
            ids += [int(part)] if index % 2 else loaded.folder.tokenizer.encode(part)

        def draw(step: Any, logits: Any, sampler: Any, limit: int, *_: Any) -> Iterator[int]:
            return itertools.islice(ids, limit)

        monkeypatch.setattr(module, "draw_tokens", draw)
        return ids

    return script


def answered(loaded: LoadedModel, **how: Any) -> Answer:
    numbers = itertools.count()
    options = SamplingOptions(max_tokens=how.pop("max_tokens", 1000), stop=how.pop("stop", None))
    run = Generation(loaded, [1, 67], options, new_call_id=lambda: f"call_{next(numbers)}", **how)
    pieces = list(run)
    answer = run.answer
    assert "".join(p.text for p in pieces if not p.is_thought) == answer.text
    assert "".join(p.text for p in pieces if p.is_thought) == answer.thought
    return answer


def test_calls_of_an_answer(loaded: LoadedModel, says: Script) -> None:
    ids = says(f"⟨69⟩Hm.⟨70⟩Let me see. ⟨71⟩{CALLS}⟨72⟩")
    answer = answered(loaded)
    assert (answer.thought, answer.text, answer.token_ids) == ("Hm.", "Let me see. ", ids)
    assert answer.tool_calls == [
        ToolCall("call_0", "f", '{"a": "é"}'), ToolCall("call_1", "g", "{}"),
    ]  # fmt: skip
    assert (answer.finish_reason, answer.malformed_tool_calls) == ("tool_calls", 0)


def test_the_end_of_calls_ends_an_answer_whatever_the_folder_says(
    loaded: LoadedModel, says: Script
) -> None:
    assert 72 in loaded.folder.stop_ids
    ids = says(f"⟨71⟩{CALLS}⟨72⟩[7] and more")
    assert answered(loaded).token_ids == ids[: ids.index(72) + 1]


def test_a_call_that_is_cut_stays_cut(loaded: LoadedModel, says: Script) -> None:
    ids = says(f"⟨71⟩{CALLS}⟨72⟩")
    whole = len(ids) - 1
    seen = set()
    for limit in range(1, len(ids)):
        answer = answered(loaded, max_tokens=limit)
        calls = [(call.name, call.arguments) for call in answer.tool_calls]
        for (name, arguments), wanted in zip(
            calls, [("f", '{"a": "é"}'), ("g", "{}")], strict=False
        ):
            assert name == wanted[0] and wanted[1].startswith(arguments)
        assert answer.finish_reason == ("tool_calls" if limit == whole else "length")
        assert (answer.text, answer.malformed_tool_calls) == ("", 0)
        seen.add(len(calls))
    assert seen == {0, 1, 2}


def test_a_malformed_call_is_text_and_said(
    loaded: LoadedModel, says: Script, caplog: pytest.LogCaptureFixture
) -> None:
    says('⟨71⟩[{"f": {}, "g": {}}]⟨72⟩')
    answer = answered(loaded)
    assert (answer.text, answer.tool_calls) == ('[{"f": {}, "g": {}}]', [])
    assert (answer.finish_reason, answer.malformed_tool_calls) == ("stop", 1)
    assert "no valid JSON" in caplog.text


def test_calls_without_control_token(loaded: LoadedModel, says: Script) -> None:
    says(f"{CALLS}⟨68⟩")
    assert answered(loaded).text == CALLS
    answer = answered(loaded, tool_names=["f", "g"])
    assert (answer.text, len(answer.tool_calls), answer.finish_reason) == ("", 2, "tool_calls")


def test_a_stop_string_after_a_thoughts_call(loaded: LoadedModel, says: Script) -> None:
    says("⟨69⟩END⟨70⟩Yes. END no")
    answer = answered(loaded, stop="END")
    assert (answer.thought, answer.text, answer.finish_reason) == ("END", "Yes. ", "stop")


def test_the_command_line_shows_a_call_as_one(
    says: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    says('Let me see.⟨71⟩[{"f": {"a":\n1}},\n{"g": {}}]⟨72⟩')
    generate("x", sampling=SamplingOptions(), settings=RunOptions())
    assert capsys.readouterr().out == 'Let me see.\nf {"a": 1}\ng {}\n'
    generate("x", sampling=SamplingOptions(), settings=RunOptions(), json=True)
    report = json.loads(capsys.readouterr().out)
    assert report["text"] == "Let me see."
    calls = [(call["name"], call["arguments"]) for call in report["tool_calls"]]
    assert calls == [("f", '{"a":\n1}'), ("g", "{}")]
    assert all(call["id"].startswith("call_") for call in report["tool_calls"])
    assert report["finish_reason"] == "tool_calls"


def test_lines_begin_where_a_call_or_what_follows_it_begins(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def call(index: int, name: str | None = None, arguments: str = "", **how: Any) -> Piece:
        part = CallPiece(index, None if name is None else "id", name, arguments, **how)
        return Piece("", call=part)

    print_pieces([Piece("t", is_thought=True), call(0, "f"), call(0, arguments="{")])
    assert capsys.readouterr() == ("f {\n", "t\n")
    pieces = [call(0, "f"), call(0, arguments="{"), call(0, withdrawn=True), Piece("a"), Piece("b")]
    print_pieces(pieces)
    assert capsys.readouterr().out == "f {\nab\n"
