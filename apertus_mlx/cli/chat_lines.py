"""Where a chat's messages come from: a line editor, or the lines of standard input."""

from __future__ import annotations

import os
import signal
import sys
import termios
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from apertus_mlx.cli import several, sink
from apertus_mlx.cli.chat_commands import COMPLETIONS
from apertus_mlx.cli.chat_history import ChatHistory, history_path


class Lines(Protocol):
    """A source of messages."""

    def read(self) -> str | None:
        """The next message; None at the end."""


@contextmanager
def open_chat_lines(on_interrupt: Callable[[], None], history: bool) -> Iterator[Lines]:
    """A line editor where there is a terminal that can be edited on; `history` lasts.

    Under `mlx.launch` whoever types sits at the launcher's terminal; where ranks have one, it is
    ssh's.

    `on_interrupt` is called at Ctrl-C on an empty line. At a terminal no interrupt ends the
    program, unless it is made to meanwhile, and SIGTERM leaves the terminal as it was.
    """
    if several.is_one_of_many():
        _take_long_lines()
    if several.is_one_of_many() or not sys.stdin.isatty():
        yield PlainLines()
        return
    with _orderly_end(), _open_terminal(on_interrupt, history) as lines:
        yield lines


@contextmanager
def _open_terminal(on_interrupt: Callable[[], None], history: bool) -> Iterator[Lines]:
    # Either will do for the prompt; the other may go to a file or to a program.
    shown = sys.stderr.isatty() or sys.stdout.isatty()
    before = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        if not shown or os.environ.get("TERM") in ("dumb", "unknown"):
            yield TerminalLines(on_interrupt)
            return
        from apertus_mlx.cli.line_editor import LineEditor

        editor = LineEditor(COMPLETIONS, on_interrupt, _open_history() if history else None)
        with editor.attached():
            yield editor
    finally:
        signal.signal(signal.SIGINT, before)


class PlainLines:
    r"""The lines of standard input; one that ends with `\` goes on."""

    def read(self) -> str | None:
        """The next message; None at the end."""
        lines: list[str] = []
        while line := self._line(bool(lines)):
            line = line.removesuffix("\n")
            if not line.endswith("\\"):
                return "\n".join([*lines, line])
            lines.append(line[:-1])
        return "\n".join(lines) if lines else None

    def _line(self, goes_on: bool) -> str:  # noqa: ARG002 - for who shows a prompt
        return sys.stdin.readline()


class TerminalLines(PlainLines):
    """Those of a terminal whose cursor cannot be moved: with a prompt, and Ctrl-C ends nothing."""

    def __init__(self, on_interrupt: Callable[[], None]) -> None:
        self._on_interrupt = on_interrupt

    def read(self) -> str | None:
        """The next message; None at the end."""
        while True:
            before = signal.signal(signal.SIGINT, signal.default_int_handler)
            try:
                return super().read()
            except KeyboardInterrupt:
                sink.note("")
                self._on_interrupt()
            finally:
                signal.signal(signal.SIGINT, before)

    def _line(self, goes_on: bool) -> str:
        sink.note("  " if goes_on else "> ", end="")
        return super()._line(goes_on)


def _take_long_lines() -> None:
    """Take lines of any length from a terminal; the system cuts them off at 1,024 or 4,096."""
    if sys.stdin.isatty():
        modes = termios.tcgetattr(0)
        modes[3] &= ~(termios.ICANON | termios.ECHO)
        termios.tcsetattr(0, termios.TCSANOW, modes)


@contextmanager
def _orderly_end() -> Iterator[None]:
    """Make SIGTERM an exit, on whose way out whoever changed the terminal changes it back."""

    def leave(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _open_history() -> ChatHistory | None:
    try:
        path = history_path()
    except RuntimeError as error:  # the user has no home
        sink.note(f"{error}; the history of this chat is not kept")
        return None
    return ChatHistory(path, sink.note)
