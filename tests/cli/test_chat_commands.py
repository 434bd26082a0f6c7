"""Commands in a chat: what they take, what they say, and which files they touch."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from apertus_mlx.cli.chat import _Talk
from apertus_mlx.cli.chat_commands import COMMANDS, ChatCommands, read_request
from apertus_mlx.errors import ApertusError, RejectedError, UsageError
from apertus_mlx.generation.conversation import Conversation
from apertus_mlx.generation.model_folder import LoadedModel, open_folder
from apertus_mlx.generation.options import SamplingOptions
from apertus_mlx.generation.tool_grammar import ToolGrammar
from apertus_mlx.generation.tool_set import read_tool_set
from apertus_mlx.hub.demo import model_dir
from apertus_mlx.text.template import Message

GREEDY = SamplingOptions(temperature=0)
QUESTION, ANSWER = "What is the capital of France?", "The capital of France is Paris."


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return open_folder(model_dir()).load()


@pytest.fixture
def talk(loaded: LoadedModel) -> Conversation:
    return Conversation(loaded)


def asked(talk: Conversation) -> Conversation:
    list(talk.ask(QUESTION, GREEDY))
    return talk


def commands(talk: Conversation) -> ChatCommands:
    return ChatCommands(talk, lambda: None)


def said(chat: ChatCommands, line: str) -> str:
    request = read_request(line)
    assert request.command is not None
    return chat.run(request) or ""


@pytest.mark.parametrize(
    ("line", "request_"),
    [
        ("hello", (None, "hello")),
        ("  hello\n ", (None, "  hello\n ")),
        ("/help", ("/help", "")),
        (" /undo ", ("/undo", "")),
        ("/system Be kind.\nAlways.", ("/system", "Be kind.\nAlways.")),
        ("/save  a name.json ", ("/save", "a name.json")),
        ("/undo please", ("/undo", "please")),
        ("/Help", ("/Help", "")),
        ("/", ("/", "")),
        ("/usr/bin", ("/usr/bin", "")),
        ("/usr/bin is what?", (None, "/usr/bin is what?")),
        ("/undone it?", (None, "/undone it?")),
        ("//undo", (None, "/undo")),
        ("//", (None, "/")),
        ("what does /undo do?", (None, "what does /undo do?")),
        ("", (None, "")),
        (" \n", (None, " \n")),
    ],
)  # fmt: skip
def test_what_is_a_command(line: str, request_: tuple[str | None, str]) -> None:
    assert read_request(line) == request_


def test_all_commands_are_in_the_help(talk: Conversation) -> None:
    told = said(commands(talk), "/help")
    assert all(name in told for name in COMMANDS) and "Ctrl-D" in told


def test_what_cannot_be_done_is_said(talk: Conversation, tmp_path: Path) -> None:
    chat = commands(talk)
    for line, told in (
        ("/what", "/what: unknown; /help .* //what"),
        ("/undo it", "/undo takes no text"),
        ("/undo", "nothing to undo"),
        ("/retry", "nothing to retry"),
        ("/think maybe", "/think maybe: expected on or off"),
        ("/save", "nothing to save"),
        ("/load", "/load needs the name"),
        ("/load /dev/null", "not a regular file"),
        (f"/load {tmp_path / 'absent'}", "no such file"),
    ):
        with pytest.raises(ApertusError, match=told):
            said(chat, line)
    assert talk.messages == [] and said(chat, "/stats") == "nothing has been answered yet"


def test_system_and_think(talk: Conversation) -> None:
    chat = commands(talk)
    assert said(chat, "/system") == "there is no system message"
    said(chat, "/system Be kind.")
    assert talk.messages == [{"role": "system", "content": "Be kind."}]
    said(chat, "/system Be\nbrief.")
    assert talk.messages == [{"role": "system", "content": "Be\nbrief."}]
    assert said(chat, "/system") == "the system message is: Be\nbrief."
    said(chat, "/system off")
    assert talk.messages == []
    assert said(chat, "/think") == "the model does not deliberate before it answers"
    assert said(chat, "/think on") == "the model deliberates before it answers" and talk.think
    said(chat, "/think off")
    assert not talk.think


def test_which_files_are_written_over(
    talk: Conversation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    chat = commands(asked(talk))
    theirs = tmp_path / "theirs.json"
    theirs.write_text("precious")
    with pytest.raises(UsageError, match=r"theirs.json: is there already; /save! theirs.json"):
        said(chat, "/save theirs.json")
    assert theirs.read_text() == "precious"
    with pytest.raises(UsageError, match="/save needs the name"):
        said(chat, "/save")
    assert said(chat, "/save ~/a b.json") == f"saved 2 messages to {tmp_path}/a b.json"
    own = tmp_path / "a b.json"
    assert json.loads(own.read_text()) == {
        "messages": [
            {"role": "user", "content": QUESTION},
            {"role": "assistant", "content": ANSWER},
        ]
    }
    # Its own file it may write again, by whatever name, and one that it has read.
    talk.undo()
    talk.system = "Be kind."
    said(chat, "/save ./a b.json")
    assert len(json.loads(own.read_text())["messages"]) == 1
    assert said(chat, "/save! theirs.json") == "saved 1 message to theirs.json"
    said(chat, "/load a b.json")
    said(chat, "/save")
    # Nothing but files, not even by order, and nothing half.
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    for name in ("folder", "fifo", "/dev/null"):
        with pytest.raises(UsageError, match="no file"):
            said(chat, f"/save! {name}")
    with pytest.raises(FileNotFoundError):
        said(chat, "/save absent/file.json")
    names = {"a b.json", "theirs.json", "folder", "fifo"}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_a_refused_file_changes_nothing(talk: Conversation, tmp_path: Path) -> None:
    chat = commands(asked(talk))
    before = list(talk.messages)
    path = tmp_path / "talk.json"
    for text, kind in (
        ("[]", RejectedError),
        ('[{"role": "user", "content": 7}]', RejectedError),
        (json.dumps([{"role": "user", "content": "word " * 9999}]), UsageError),
    ):
        path.write_text(text)
        with pytest.raises(kind):
            said(chat, f"/load {path}")
    assert talk.messages == before
    path.write_text(json.dumps(before[:1]))
    assert said(chat, f"/load {path}") == f"loaded 1 message from {path}; /retry answers the last"
    assert talk.messages == before[:1]


def test_instructions_of_a_developer(talk: Conversation) -> None:
    """They lead a conversation as a system message does."""
    chat = commands(talk)
    developer, question = said_by("developer", "Be brief."), said_by("user", QUESTION)
    talk.load([developer, question, said_by("assistant", ANSWER)])
    assert said(chat, "/system") == "the system message is: Be brief."
    assert said(chat, "/reset") == "forgot the conversation; the system message stays"
    assert talk.messages == [developer]
    talk.load([said_by("system", "Be kind."), developer, question])
    assert said(chat, "/system") == "the system message is: Be kind.\n\nBe brief."
    said(chat, "/system Be loud.")
    assert talk.messages == [said_by("system", "Be loud."), question]
    said(chat, "/system off")
    assert talk.messages == [question]
    # The structure of a template is no text, and stays.
    structure = Message(role="developer", content={"has_tool_calling": False})
    talk.messages = [structure, developer, question]
    said(chat, "/system Be kind.")
    assert talk.messages == [said_by("system", "Be kind."), structure, question]
    said(chat, "/reset")
    assert talk.messages == [said_by("system", "Be kind."), structure]


def said_by(role: str, content: str) -> Message:
    return Message(role=role, content=content)


class Typed:
    """Lines that somebody types; a function among them is called in the next answer."""

    def __init__(self, *lines: str) -> None:
        self._lines = iter(lines)

    def read(self) -> str | None:
        return next(self._lines, None)


@pytest.fixture
def handler() -> Iterator[None]:
    before = signal.getsignal(signal.SIGINT)
    yield
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("times", [1, 2, 3])
def test_an_interrupt_ends_the_answer_and_a_second_one_at_once(
    talk: Conversation,
    times: int,
    handler: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    step = type(talk._prefix)._step
    steps = 0

    def interrupted(*arguments: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 4:
            signal.raise_signal(signal.SIGINT)
            try:
                for _ in range(times > 1):
                    signal.raise_signal(signal.SIGINT)
            finally:
                # While the second is on its way out.
                for _ in range(times > 2):
                    signal.raise_signal(signal.SIGINT)
        return step(*arguments)

    monkeypatch.setattr(type(talk._prefix), "_step", interrupted)
    _Talk(talk, Typed(QUESTION), GREEDY, 512).run()
    out, err = capsys.readouterr()
    told = "stopped; what was said stays in the conversation; /retry answers again"
    assert err.splitlines() == ["type a message; /help for more", told]
    assert ANSWER.startswith(out.strip()) and 0 < len(out.strip()) < len(ANSWER)
    assert out == f"{talk.messages[-1]['content']}\n"
    # The first waits for the end of a step, so that a cache of any form stays whole.
    last = talk.last_answer
    assert last is not None
    assert len(talk._prefix.tokens) - last.prompt_tokens == (4 if times == 1 else 3)
    monkeypatch.undo()
    _Talk(talk, Typed("/retry"), GREEDY, 512).run()
    assert capsys.readouterr().out == f"{ANSWER}\n"


def test_a_result_may_be_empty(talk: Conversation, capsys: pytest.CaptureFixture[str]) -> None:
    calls = [
        {"id": each, "type": "function", "function": {"name": each, "arguments": "{}"}}
        for each in ("first", "second")
    ]
    talk.load([said_by("user", QUESTION), Message(role="assistant", tool_calls=calls)])
    _Talk(talk, Typed("", " sunny"), GREEDY, 512).run()
    assert [
        (each["tool_call_id"], each["content"]) for each in talk.messages if each["role"] == "tool"
    ] == [("first", ""), ("second", " sunny")]
    # A question may not.
    before = list(talk.messages)
    _Talk(talk, Typed("", "  "), GREEDY, 512).run()
    assert talk.messages == before
    assert "error" not in capsys.readouterr().err


def test_tools_are_compiled_once(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []

    class Counted(ToolGrammar):
        def __init__(self, tools: Any, choice: str = "auto") -> None:
            compiled.append(choice)
            super().__init__(tools, choice)

    monkeypatch.setattr("apertus_mlx.generation.tool_set.ToolGrammar", Counted)
    function = {"name": "weather", "parameters": {"type": "object", "properties": {}}}
    talk = Conversation(loaded, tools=read_tool_set([{"type": "function", "function": function}]))
    short = SamplingOptions(temperature=0, max_tokens=2, logit_bias={71: -100})
    for _ in range(3):
        list(talk.ask(QUESTION, short))
    assert compiled == ["auto"]


def test_errors_of_a_turn(
    talk: Conversation, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that does not fit is told; after others the chat goes on only where somebody sits."""
    # Two tokens a word, and 17 beside them.
    too_long, long = "word " * 9999, "word " * ((talk.context_length - 20) // 2)
    _Talk(talk, Typed(too_long, QUESTION, too_long, long), GREEDY, 512).run()
    out, err = capsys.readouterr()
    assert out == f"{ANSWER}\n"
    # What is too long by itself finds no room however much is forgotten.
    rooms = ["/undo or /reset makes room" in line for line in err.splitlines()]
    assert rooms == [False, False, False, True] and err.count("error: the prompt has") == 3
    # Nor is it room that other mistakes want.
    _Talk(talk, Typed(QUESTION), SamplingOptions(logit_bias={10**6: 1}), 512).run()
    err = capsys.readouterr().err
    assert "error: " in err and "makes room" not in err

    def fail(*_: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(type(talk._prefix), "_read", fail)
    with pytest.raises(MemoryError):
        _Talk(talk, Typed(QUESTION), GREEDY, 512).run()
    for stream in ("stdin", "stdout"):
        monkeypatch.setattr(f"sys.{stream}.isatty", lambda: True)
    _Talk(talk, Typed(QUESTION, "/undo"), GREEDY, 512).run()
    assert "error: not enough memory" in capsys.readouterr().err
