"""A chat's messages where no line can be edited: those of standard input."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from apertus_mlx.cli.chat_lines import PlainLines, TerminalLines, open_chat_lines
from tests.house.test_house import loaded_after


def stdin(monkeypatch: pytest.MonkeyPatch, terminal: bool, *lines: str | None) -> None:
    """Lines with their ends, then the end; None is an interrupt."""
    left = iter(lines)

    def readline() -> str:
        line = next(left, "")
        if line is None:
            signal.raise_signal(signal.SIGINT)
            return ""
        return line

    double = SimpleNamespace(isatty=lambda: terminal, readline=readline)
    monkeypatch.setattr("sys.stdin", double)


def read_all(read: Callable[[], str | None]) -> list[str]:
    return list(iter(read, None))


def test_lines_that_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stdin(monkeypatch, False, "one\n", "two\\\n", "lines\\\n", "\n", "\n", "end\\\n")
    with open_chat_lines(lambda: None, history=True) as lines:
        assert isinstance(lines, PlainLines)
        assert read_all(lines.read) == ["one", "two\nlines\n", "", "end"]
    assert capsys.readouterr() == ("", "")


def test_a_terminal_that_cannot_move_its_cursor(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told: list[str] = []
    stdin(monkeypatch, True, "one\n", "lost\\\n", None, "two\\\n", "lines\n")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("TERM", "dumb")
    with open_chat_lines(lambda: told.append("interrupt"), history=True) as lines:
        assert isinstance(lines, TerminalLines)
        assert read_all(lines.read) == ["one", "two\nlines"]
        # Between two messages it does nothing.
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert told == ["interrupt"]
    assert capsys.readouterr() == ("", "> >   \n>   > ")


def test_an_interrupt_ends_what_nobody_types(monkeypatch: pytest.MonkeyPatch) -> None:
    stdin(monkeypatch, False, None)
    with open_chat_lines(lambda: None, history=True) as lines, pytest.raises(KeyboardInterrupt):
        lines.read()


def test_the_line_editor_is_imported_for_a_terminal_alone() -> None:
    loaded = loaded_after("import apertus_mlx.cli.chat")
    assert not loaded & {"prompt_toolkit", "mlx", "numpy", "jinja2", "tokenizers"}
