"""Where a chat's messages come from: a line editor, or the lines of standard input."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from apertus_mlx.cli import sink
from apertus_mlx.cli.chat_commands import COMPLETIONS
from apertus_mlx.cli.chat_history import ChatHistory, history_path


class Lines(Protocol):
    """A source of messages."""

    def read(self) -> str | None:
        """The next message; None at the end."""

    def aside(self) -> AbstractContextManager[None]:
        """Leave the terminal to an answer."""


def open_chat_lines(on_interrupt: Callable[[], None], history: bool) -> Lines:
    """A line editor where there is a terminal that can be edited on; `history` lasts.

    `on_interrupt` is called at Ctrl-C on an empty line.
    """
    # Either will do for the prompt; the other may go to a file or to a program.
    shown = sys.stderr.isatty() or sys.stdout.isatty()
    if not (sys.stdin.isatty() and shown) or os.environ.get("TERM") in ("dumb", "unknown"):
        return PlainLines(on_interrupt)
    from apertus_mlx.cli.line_editor import LineEditor

    return LineEditor(COMPLETIONS, on_interrupt, _open_history() if history else None)


class PlainLines:
    r"""The lines of standard input; one that ends with `\` goes on."""

    def __init__(self, on_interrupt: Callable[[], None]) -> None:
        self._on_interrupt = on_interrupt
        self._terminal = sys.stdin.isatty()

    def read(self) -> str | None:
        """The next message; None at the end."""
        lines: list[str] = []
        while True:
            if self._terminal:
                sink.note("  " if lines else "> ", end="")
            try:
                line = sys.stdin.readline()
            except KeyboardInterrupt:
                if not self._terminal:
                    raise
                sink.note("")
                lines.clear()
                self._on_interrupt()
                continue
            if not line:
                return "\n".join(lines) if lines else None
            line = line.removesuffix("\n")
            if not line.endswith("\\"):
                return "\n".join([*lines, line])
            lines.append(line[:-1])

    def aside(self) -> AbstractContextManager[None]:
        """Nothing has to be done."""
        return nullcontext()


def _open_history() -> ChatHistory | None:
    try:
        path = history_path()
    except RuntimeError as error:  # the user has no home
        sink.note(f"{error}; the history of this chat is not kept")
        return None
    return ChatHistory(path, sink.note)
