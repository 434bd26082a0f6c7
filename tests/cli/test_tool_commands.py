"""Tools on the command line: calls that are shown, results that come back, files between."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from apertus_mlx.cli.chat import _Talk
from apertus_mlx.cli.generate import generate
from apertus_mlx.errors import NotFoundError, RejectedError, UsageError
from apertus_mlx.generation.conversation import Conversation
from apertus_mlx.generation.model_folder import LoadedModel, open_folder
from apertus_mlx.generation.options import RunOptions, SamplingOptions
from apertus_mlx.generation.tool_set import read_tool_set
from apertus_mlx.hub.demo import model_dir
from tests.cli.test_chat_commands import Typed
from tests.scripted_answers import as_text, script_answers

GREEDY = SamplingOptions(temperature=0, max_tokens=400)
QUESTION = "What is the weather in Bern and Zug?"
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {"name": "weather", "description": "Look.", "parameters": CITY},
    }
]
CALLS = '⟨71⟩[{"weather": {"city": "Bern"}}, {"weather": {"city": "Zug"}}]⟨72⟩'
SHOWN = 'weather {"city": "Bern"}\nweather {"city": "Zug"}\n'
ASKED = [
    'what does weather {"city": "Bern"} give?', 'what does weather {"city": "Zug"} give?',
]  # fmt: skip


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return open_folder(model_dir()).load()


Script = Callable[..., None]


@pytest.fixture
def says(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> Script:
    return lambda *texts, **how: script_answers(monkeypatch, loaded.folder.tokenizer, *texts, **how)


@pytest.fixture
def talk(loaded: LoadedModel) -> Conversation:
    return Conversation(loaded, tools=read_tool_set(TOOLS))


def run(talk: Conversation, *lines: str) -> None:
    _Talk(talk, Typed(*lines), GREEDY, 512).run()


def prompt(talk: Conversation) -> str:
    last = talk.last_answer
    assert last is not None
    return as_text(talk._loaded.folder.tokenizer, last.prompt_token_ids)


def test_a_chat_asks_for_results(
    talk: Conversation, says: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    says(f"Let me see. {CALLS}", "Warm.⟨68⟩", "Bye.⟨68⟩")
    run(talk, QUESTION, "sunny", "//cold", "Thanks.")
    out, err = capsys.readouterr()
    assert out == f"Let me see. \n{SHOWN}Warm.\nBye.\n"
    assert err.splitlines() == ["type a message; /help for more", *ASKED]
    roles = [message["role"] for message in talk.messages]
    assert roles == ["user", "assistant", "tool", "tool", "assistant", "user", "assistant"]
    assert (
        f"⟨65⟩{QUESTION}⟨66⟩⟨67⟩Let me see. {CALLS}[sunny, /cold]Warm.⟨68⟩⟨65⟩Thanks.⟨66⟩⟨67⟩"
    ) in prompt(talk)


def test_commands_between_calls_and_results(
    talk: Conversation, says: Script, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "talk.json"
    says(CALLS, CALLS, "Warm.⟨68⟩", CALLS, CALLS, "Cold.⟨68⟩")
    run(talk, QUESTION, "old", "/retry", "sunny", f"/save {path}", "/think", "dry")
    assert "[sunny, dry]⟨68⟩⟨67⟩" in prompt(talk)
    assert capsys.readouterr().err.count(ASKED[0]) == 2
    run(talk, QUESTION, "/undo", QUESTION, f"/load {path}", "old", f"/load {path}", "wet", "cold")
    out, err = capsys.readouterr()
    assert out == f"{SHOWN}{SHOWN}Cold.\n" and err.count("loaded 2 messages") == 2
    assert "[wet, cold]⟨68⟩⟨67⟩" in prompt(talk)
    assert [message["role"] for message in talk.messages].count("user") == 1


@pytest.mark.parametrize("ids", [{"id": "x"}, {"id": None}, {}])
def test_a_file_that_ends_with_calls(
    ids: dict[str, Any], talk: Conversation, says: Script, tmp_path: Path
) -> None:
    """As others write one: ids are theirs, null or missing, and arguments an object."""
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bern"}}}
    calls = [{**ids, **call}]
    question = {"role": "user", "content": [{"type": "text", "text": "How is it?"}]}
    system = {"role": "system", "content": [{"type": "text", "text": "Be kind."}]}
    path = tmp_path / "talk.json"
    path.write_text(
        json.dumps([system, question, {"role": "assistant", "content": None, "tool_calls": calls}])
    )
    says("Warm.⟨68⟩")
    run(talk, f"/load {path}", "sunny")
    assert talk.system == "Be kind."
    assert '⟨65⟩How is it?⟨66⟩⟨67⟩⟨71⟩[{"weather": {"city": "Bern"}}]⟨72⟩[sunny]' in prompt(talk)


def test_results_that_cannot_be_given_are_asked_for_again(
    talk: Conversation, says: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    says(CALLS, "Warm.⟨68⟩")
    run(talk, QUESTION, "sunny", "word " * 9999, "sunny", "dry")
    out, err = capsys.readouterr()
    assert out == f"{SHOWN}Warm.\n"
    told = [line[:9] for line in err.splitlines()[1:]]
    assert told == [*["what does"] * 2, "error: th", *["what does"] * 2]
    says(CALLS, "Warm.⟨68⟩")
    run(talk, QUESTION, "sunny")
    with pytest.raises(UsageError, match="give their results, or undo"):
        list(talk.ask("Well?"))


def test_an_interrupt_leaves_no_half_call(
    talk: Conversation, says: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    says(CALLS, CALLS, "Warm.⟨68⟩", interrupt_after=30)
    run(talk, QUESTION)
    assert talk.messages[1:] == [{"role": "assistant", "content": ""}]
    assert capsys.readouterr().out.startswith('weather {"city": "Bern"')
    run(talk, "/retry", "sunny", "dry")
    assert capsys.readouterr().out == f"{SHOWN}Warm.\n"
    says(CALLS, "Half of this.⟨68⟩", "All of it.⟨68⟩")
    run(talk, QUESTION, "sunny", "dry")
    says("Half of this.⟨68⟩", "All of it.⟨68⟩", interrupt_after=2)
    run(talk, "More?", "And now?")
    assert capsys.readouterr().out.endswith("All of it.\n")


def test_a_final_call_needs_no_result(talk: Conversation, says: Script) -> None:
    says('⟨71⟩[{"display_answers": {"answer": "7"}}]⟨72⟩', "Bye.⟨68⟩")
    run(talk, QUESTION, "Thanks.")
    assert [message["role"] for message in talk.messages] == ["user", "assistant"] * 2


def test_tools_or_thoughts_where_a_model_has_no_both(
    talk: Conversation, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    template = talk._loaded.folder.template
    assert template is not None
    # As in v1.5.
    monkeypatch.setitem(template._form.__dict__, "encloses_results", True)
    run(talk, "/think on", "/think")
    told = capsys.readouterr().err.splitlines()[1:]
    assert told == [
        "this model deliberates or calls tools, not both; leave one of them out",
        "the model does not deliberate before it answers",
    ]


def report(capsys: pytest.CaptureFixture[str], *arguments: Any, **how: Any) -> dict[str, Any]:
    generate(*arguments, sampling=GREEDY, settings=RunOptions(), json=True, **how)
    values: dict[str, Any] = json.loads(capsys.readouterr().out)
    return values


@pytest.mark.parametrize("think", [False, True])
def test_messages_go_on_from_an_answer(
    think: bool,
    says: Script,
    loaded: LoadedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tools, messages = tmp_path / "tools.json", tmp_path / "messages.json"
    tools.write_text(json.dumps({"tools": TOOLS}))
    thoughts, closed = ("⟨69⟩Hm.", "So it is.⟨70⟩") if think else ("", "")
    says(f"{thoughts}{CALLS}", f"{closed}Warm.⟨68⟩", "Warm again.⟨68⟩")
    asked = report(capsys, QUESTION, tools=tools, think=think)
    assert asked["finish_reason"] == "tool_calls"
    assert asked["message"].get("reasoning_content") == ("Hm." if think else None)
    first, second = (call["id"] for call in asked["message"]["tool_calls"])
    talk = [
        {"role": "user", "content": QUESTION},
        asked["message"],
        {"role": "tool", "tool_call_id": second, "content": "dry"},
        {"role": "tool", "tool_call_id": first, "content": "sunny"},
    ]
    messages.write_text(json.dumps({"messages": talk}))
    answer = report(capsys, tools=tools, messages=messages, think=think)
    assert answer["message"] == {"role": "assistant", "content": "Warm."}
    assert (answer["text"], answer["thoughts"]) == ("Warm.", "So it is." if think else "")
    shown = as_text(loaded.folder.tokenizer, answer["prompt_token_ids"])
    assert shown.endswith(f"⟨65⟩{QUESTION}⟨66⟩⟨67⟩{thoughts}{CALLS}[sunny, dry]⟨68⟩⟨67⟩")
    text = json.dumps([*talk, answer["message"], {"role": "user", "content": "Again?"}])
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    generate(messages=Path("-"), tools=tools, sampling=GREEDY, settings=RunOptions())
    assert capsys.readouterr().out == "Warm again.\n"


def test_a_cut_call_is_not_gone_on_from(
    says: Script, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tools = tmp_path / "tools.json"
    tools.write_text(json.dumps(TOOLS))
    says(f"Well. {CALLS}")
    how = SamplingOptions(max_tokens=30)
    generate("Hi", tools=tools, json=True, sampling=how, settings=RunOptions())
    cut = json.loads(capsys.readouterr().out)
    assert (cut["finish_reason"], len(cut["tool_calls"])) == ("length", 1)
    assert cut["message"] == {"role": "assistant", "content": "Well. "}


def test_a_filter_and_calls(
    says: Script, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tools, rules = tmp_path / "tools.json", tmp_path / "rules.json"
    tools.write_text(json.dumps(TOOLS))
    rules.write_text(json.dumps({"rules": [{"texts": ["Bern"], "replacement": "[city]"}]}))
    says(f"Bern? {CALLS}")
    found = report(capsys, "Hi", tools=tools, output_filter=str(rules))
    assert found["token_ids"] == [] and "Bern" not in json.dumps(found)
    function = found["message"]["tool_calls"][0]["function"]
    assert function == {"name": "weather", "arguments": '{"city": "[city]"}'}
    # Without its quotes it is no JSON, and nobody could go on from it.
    rules.write_text(json.dumps({"rules": [{"texts": ['"Bern"'], "replacement": "[city]"}]}))
    says(CALLS)
    found = report(capsys, "Hi", tools=tools, output_filter=str(rules))
    assert found["tool_calls"][0]["arguments"] == '{"city": [city]}'
    assert found["message"]["tool_calls"][0]["function"]["arguments"] == "{}"


@pytest.mark.parametrize(
    ("how", "kind", "told"),
    [
        ({"messages": "absent.json"}, NotFoundError, "no such file"),
        ({"messages": "tools.json"}, RejectedError, r"messages\[0\].role: is missing"),
        ({"messages": "open.json"}, UsageError, "^--messages: the last one calls weather"),
        ({"messages": "talk.json", "system": "x"}, UsageError, "leave out PROMPT and --system"),
        ({"messages": "talk.json", "prompt": "x"}, UsageError, "leave out PROMPT and --system"),
        ({"messages": "talk.json", "raw": True}, UsageError, "--raw continues a text"),
        ({"prompt": "x", "tools": "tools.json", "raw": True}, UsageError, "none of .* --tools"),
        ({"prompt": "x", "tools": "absent.json"}, NotFoundError, "no such file"),
        ({"prompt": "x", "tools": "open.json"}, RejectedError, "expected a list of tools"),
        ({"prompt": "x", "tools": "talk.json"}, RejectedError, r"talk.json\[0\].name: expected"),
        ({"prompt": "x", "tool_choice": "required"}, UsageError, "there are no tools"),
        ({"prompt": "x", "tools": "tools.json", "tool_choice": "look"}, UsageError, "no such tool"),
    ],
)
def test_what_is_refused_before_a_model_is_looked_for(
    how: dict[str, Any],
    kind: type[Exception],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("llguidance")
    monkeypatch.chdir(tmp_path)
    question = {"role": "user", "content": "x"}
    call = {"type": "function", "function": {"name": "weather"}}
    files = {
        "tools": {"tools": TOOLS, "messages": TOOLS},
        "talk": [question],
        "open": {"messages": [question, {"role": "assistant", "tool_calls": [call]}]},
    }
    for name, value in files.items():
        Path(f"{name}.json").write_text(json.dumps(value))
    how |= {key: Path(how[key]) for key in ("messages", "tools") if key in how}
    with pytest.raises(kind, match=told):
        generate(model="no/such", sampling=GREEDY, settings=RunOptions(), **how)
