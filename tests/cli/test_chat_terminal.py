"""`chat` in a pseudo-terminal: what is typed, pasted and interrupted, and what comes of it."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from tests.endless_model import write_endless_model
from tests.terminal import ALT_ENTER, BACKSPACE, CTRL_C, CTRL_D, ENTER, LEFT, TAB, UP, Terminal

QUESTION, ANSWER = "What is the capital of France?", "The capital of France is Paris."
# Each character once, so that a model that knows the last one can go on.
ORDER, SHOWN = "\x1b]0;xyz\x07", r"\x1b]0;xyz\x07"
RING = "abcdefgh "
# In the folder of programs' state, by the XDG specification.
HISTORY = Path("apertus-mlx") / "chat-history.jsonl"


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that begins every answer with an order to the terminal, and then never stops."""
    return write_endless_model(tmp_path_factory.mktemp("talker"), RING, ORDER)


def saved(path: Path) -> list[tuple[str, str]]:
    messages = json.loads(path.read_text())["messages"]
    return [(message["role"], message["content"]) for message in messages]


def holders(folder: Path, text: str) -> list[str]:
    """Which files below `folder` hold `text`."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    held = [path for path in files if text.encode() in path.read_bytes()]
    return sorted(str(path.relative_to(folder)) for path in held)


def at_home(folder: Path) -> dict[str, str]:
    """An environment in which all that a program may write lies below `folder`."""
    (folder / "tmp").mkdir(parents=True, exist_ok=True)
    names = {"HOME": "", "XDG_STATE_HOME": "state", "XDG_CACHE_HOME": "cache", "TMPDIR": "tmp"}
    return {name: str(folder / below) for name, below in names.items()}


def test_an_answer_is_stopped_and_stays(talker: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text(json.dumps([{"role": ORDER, "content": "x"}]))
    system = {"role": "system", "content": f"{ORDER}be\nbrief"}
    (tmp_path / "told.json").write_text(json.dumps([system]))
    # A history that cannot be used is told once, and is no error.
    home = at_home(tmp_path)
    (tmp_path / "state" / HISTORY).mkdir(parents=True)
    arguments = ["chat", "-m", talker, "-t", "0", "-n", "1000000"]
    with Terminal(arguments, columns=40, environment=home, cwd=tmp_path) as terminal:
        terminal.wait_for_prompt()
        # Lines are wrapped where words end, or not, as long as the folder's name has it.
        told = "thehistoryofthischatisnotkept"
        assert "".join(terminal.text.split()).count(told) == 1
        terminal.send(f"go{ENTER}")
        terminal.wait_for(RING * 3)
        terminal.send(CTRL_C)
        terminal.wait_for("stopped; what was said stays")
        terminal.wait_for_prompt(beyond=1)
        terminal.send(CTRL_C)
        terminal.wait_for("Ctrl-D ends the chat")
        terminal.wait_for_prompt(beyond=2)
        terminal.press("word", "> word")
        terminal.press(CTRL_C, ">")
        terminal.enter("/save stopped.json")
        question, answer = saved(tmp_path / "stopped.json")
        assert question == ("user", "go")
        assert answer[0] == "assistant" and answer[1].startswith(ORDER + RING * 2)
        assert (ORDER + RING * len(answer[1])).startswith(answer[1])
        # The next question is put behind what was said; a paste waits for the end of an answer.
        terminal.send(f"on{ENTER}")
        terminal.wait_for(SHOWN, times=2)
        terminal.paste("one\ntwo")
        terminal.interrupt()
        terminal.wait_for("stopped; what was said stays", times=2)
        terminal.wait_for("> one\n  two")
        terminal.press(CTRL_C, ">")
        terminal.enter("/save")
        assert saved(tmp_path / "stopped.json")[:3] == [question, answer, ("user", "on")]
        # Nothing of a stranger's file reaches the terminal either.
        for name in ("bad.json", "told.json", ORDER):
            terminal.enter(f"/load {name.encode('unicode_escape').decode()}")
        terminal.enter("/system")
        # The line is wrapped.
        assert rf"the system message is: {SHOWN}be\nbrief" in terminal.text.replace("\n", "")
        terminal.send(CTRL_D)
        assert terminal.end() == 0
        assert "".join(terminal.text.split()).count(told) == 1
        assert ORDER.encode() not in terminal.raw


def test_a_termination_leaves_the_terminal_as_it_was(tmp_path: Path) -> None:
    with Terminal(["chat", "--no-history"], environment=at_home(tmp_path)) as terminal:
        before = terminal.modes()
        terminal.wait_for_prompt()
        assert terminal.modes() != before
        terminal.terminate()
        assert terminal.end() == 128 + 15
        assert terminal.modes() == before and not terminal.marks_pastes


def test_typing_commands_and_history(tmp_path: Path) -> None:
    home, here = at_home(tmp_path / "home"), tmp_path / "here"
    here.mkdir()
    with Terminal(["chat", "-t", "0"], environment=home, cwd=here) as terminal:
        terminal.wait_for_prompt()
        terminal.paste("What is the capital\nof France?")
        terminal.press("", "> What is the capital", "  of France?")
        terminal.enter()
        terminal.wait_for(ANSWER)
        terminal.press(f"Grüezi 日本\\{ENTER}語{LEFT}🙂", "> Grüezi 日本", "  🙂語")
        terminal.press(f"{ALT_ENTER}x{BACKSPACE}", "> Grüezi 日本", "  🙂", "  語")
        terminal.enter()
        terminal.enter("/save talk.json")
        asked = "Grüezi 日本\n🙂\n語"
        messages = saved(here / "talk.json")
        assert [role for role, _ in messages] == ["user", "assistant"] * 2
        assert [text for _, text in messages[::2]] == ["What is the capital\nof France?", asked]
        terminal.press(f"/re{TAB}", "/retry /reset", "> /re")
        terminal.press(f"{CTRL_C}/sy{TAB}", "> /system")
        terminal.press(CTRL_C, ">")
        for keys, told in (
            ("/undo", "forgot the last question and its answer; 1 question left"),
            ("/retry", "answering the last question again"),
            ("/think on", "the model deliberates before it answers"),
            ("/system Be brief.", "set the system message"),
            ("/system", "the system message is: Be brief."),
            ("/save talk.json", "saved 3 messages to talk.json"),
            ("/load talk.json", "loaded 3 messages from talk.json"),
            ("/stats", "nothing has been answered yet"),
            ("/reset", "forgot the conversation; the system message stays"),
            ("/what", "/what: unknown; /help lists the commands"),
            ("/help", "/undo                 forget the last question and its answer"),
        ):
            terminal.enter(keys)
            assert told in terminal.text, keys
        terminal.send(f"/exit{ENTER}")
        assert terminal.end() == 0
        assert terminal.text.count(ANSWER) == 2
    history = tmp_path / "home" / "state" / HISTORY
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    assert stat.S_IMODE(history.parent.stat().st_mode) == 0o700
    # What was asked stands there, in what was saved on demand, and nowhere else.
    assert holders(tmp_path, "capital") == ["here/talk.json", f"home/state/{HISTORY}"]
    kept = history.read_bytes()
    # Another run finds it; a message wider than the terminal is wrapped where characters end.
    with Terminal(["chat"], columns=12, environment=home, cwd=here) as terminal:
        terminal.wait_for_prompt()
        terminal.press(UP, "> /exit")
        terminal.press(UP, "> /help")
        terminal.press(UP * 11, "> /save talk", "  .json")
        terminal.press(UP, "> Grüezi 日", "  本", "  🙂", "  語")
        terminal.press(CTRL_C, ">")
        terminal.press("日本語日本語", "> 日本語日本", "  語")
        terminal.press(CTRL_C, ">")
        # Neither a paste nor what an earlier run kept can turn a line around or give orders.
        terminal.paste("a\u202eb\x1b[2J")
        terminal.press("", "> a\ufffdb^[[2J")
        terminal.press(CTRL_C, ">")
        terminal.send(CTRL_D)
        assert terminal.end() == 0
    # Standard output carries the model's text and nothing else, wherever it goes.
    arguments, out = ["chat", "--no-history", "-t", "0"], tmp_path / "out"
    with Terminal(arguments, environment=home, cwd=here, stdout=out) as terminal:
        terminal.wait_for_prompt()
        terminal.press(f"{UP}never kept", "> never kept")
        terminal.enter()
        terminal.enter(QUESTION)
        terminal.send(CTRL_D)
        assert terminal.end() == 0
    assert out.read_text().splitlines()[1:] == [ANSWER]
    assert history.read_bytes() == kept
    assert holders(tmp_path, "never kept") == []
