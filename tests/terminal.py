"""A command in a pseudo-terminal: keys go in, and what a person would see comes out.

Nothing sleeps. Whoever waits says for what; the limit of time only catches a hang.
"""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import termios
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import pyte

from tests.commands import COMMAND

HANG_S = 60.0
# As pyte counts modes that a program sets with `ESC [ ? N h`: a paste will be marked.
BRACKETED_PASTE = 2004 << 5
ENTER, ALT_ENTER, TAB, BACKSPACE = "\r", "\x1b\r", "\t", "\x7f"
CTRL_C, CTRL_D, UP, LEFT = "\x03", "\x04", "\x1b[A", "\x1b[D"


@dataclass
class Terminal:
    """`apertus-mlx` with `arguments` in a terminal of its own; a context that ends it.

    Attributes:
        stdout: where standard output goes instead.
        output: all that the program has written, with the seconds since it started.
    """

    arguments: Sequence[str | Path]
    columns: int = 80
    rows: int = 24
    environment: dict[str, str] = field(default_factory=dict)
    cwd: Path | None = None
    stdout: Path | None = None
    output: list[tuple[float, bytes]] = field(default_factory=list, init=False)

    def __enter__(self) -> Terminal:
        self._screen = pyte.HistoryScreen(self.columns, self.rows, history=10_000, ratio=1)
        # A program asks where the cursor is, and waits for the answer.
        self._screen.write_process_input = self.send  # type: ignore[method-assign]
        self._stream = pyte.ByteStream(self._screen)
        self._ours, theirs = pty.openpty()
        termios.tcsetwinsize(self._ours, (self.rows, self.columns))
        self._start = time.monotonic()
        self._process = subprocess.Popen(
            [*COMMAND, *self.arguments],
            preexec_fn=lambda: self._take(theirs),  # noqa: PLW1509
            env={**os.environ, "HF_HUB_OFFLINE": "1", "TERM": "xterm-256color", **self.environment},
            cwd=self.cwd,
        )
        os.close(theirs)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._ours)

    def _take(self, terminal: int) -> None:
        os.login_tty(os.dup(terminal))
        if self.stdout is not None:
            os.dup2(os.open(self.stdout, os.O_WRONLY | os.O_CREAT), 1)

    def send(self, keys: str) -> None:
        """Press keys."""
        os.write(self._ours, keys.encode("utf-8", "surrogateescape"))

    def paste(self, text: str) -> None:
        """Paste as a terminal does that was asked to mark it; a newline is sent as Enter is."""
        assert self.marks_pastes
        text = text.replace("\n", "\r")
        self.send(f"\x1b[200~{text}\x1b[201~")

    def wait(self, reached: Callable[[], object], what: str) -> None:
        """Read what the program writes until `reached`."""
        deadline = time.monotonic() + HANG_S
        while not reached():
            left = deadline - time.monotonic()
            ready = select.select([self._ours], [], [], max(left, 0))[0]
            if not ready or not self._read():
                raise AssertionError(f"{what!r} never came; there was:\n{self.text}")

    def wait_for(self, text: str, times: int = 1) -> None:
        """Wait until `text` stands on the screen, or above it."""
        self.wait(lambda: self.text.count(text) >= times, text)

    def wait_for_prompt(self, beyond: int = 0) -> None:
        """Wait until a message can be typed, at a prompt beyond the first few."""
        self.wait(lambda: self._prompts > beyond and self.lines[-1].startswith(">"), "a prompt")

    def enter(self, keys: str = "") -> None:
        """Send a line, and wait for the next prompt."""
        before = self._prompts
        self.send(keys + ENTER)
        self.wait_for_prompt(before)

    def press(self, keys: str, *lines: str) -> None:
        """Press keys, and wait until `lines` are the last ones."""
        self.send(keys)
        self.wait(lambda: self.lines[-len(lines) :] == list(lines), "\n".join(lines))

    def end(self) -> int:
        """Wait for the end; returns the exit status."""
        while self._read():
            pass
        return self._process.wait(timeout=HANG_S)

    def modes(self) -> list[Any]:
        """How the terminal is set: echo, lines or single keys, and so on."""
        return termios.tcgetattr(self._ours)

    @property
    def marks_pastes(self) -> bool:
        """Whether it was asked to mark pastes, and not to stop that."""
        return BRACKETED_PASTE in self._screen.mode

    def terminate(self) -> None:
        """Send the signal that a system's end sends."""
        self._process.terminate()

    def interrupt(self) -> None:
        """Send the signal that another program would send."""
        self._process.send_signal(signal.SIGINT)

    @property
    def _prompts(self) -> int:
        """How many times the line editor has begun to draw itself: it asks for the cursor then."""
        return self.raw.count(b"\x1b[6n")

    @property
    def raw(self) -> bytes:
        """All that the program has written."""
        return b"".join(data for _, data in self.output)

    @property
    def lines(self) -> list[str]:
        """What a person sees, with what has scrolled away; no empty lines at the end."""
        above = [_line(row, self.columns) for row in self._screen.history.top]
        lines = [*above, *(line.rstrip() for line in self._screen.display)]
        while lines and not lines[-1]:
            lines.pop()
        return lines or [""]

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def _read(self) -> bool:
        try:
            data = os.read(self._ours, 65536)
        except OSError:  # Linux says so when nobody has the other end any more
            return False
        if data:
            self.output.append((time.monotonic() - self._start, data))
            self._stream.feed(data)
        return bool(data)


def _line(row: object, columns: int) -> str:
    return "".join(row[at].data for at in range(columns)).rstrip()  # type: ignore[index]
