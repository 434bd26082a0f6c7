"""Recordings of `apertus-mlx chat` in a pseudo-terminal, one for each thing that it can do there.

    python -m benchmarks.record_chat DIR

Writes DIR/NAME.cast (asciicast v2, for `asciinema play`), and prints what stands on the screen at
the end of each as the Markdown of docs/chat.md.
"""

from __future__ import annotations

import codecs
import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.endless_model import write_endless_model
from tests.terminal import ALT_ENTER, CTRL_C, CTRL_D, ENTER, TAB, UP, Terminal

COLUMNS, ROWS = 92, 30
RING = "around "
# A viewer sees each step for so long; what the model takes comes on top.
STEP_S = 1.0
# What every chat begins with, and an answer as long as somebody happened to wait.
OPENING = re.compile(r"\A(.*\n)*type a message; /help for more\n")
ENDLESS = re.compile(rf"^({RING}){{3}}[a-z ]*(\n[a-z ]*)*(?=\nstopped)", re.MULTILINE)


@dataclass
class Recording:
    """What a terminal showed, in one or several runs of `chat` in the same folder."""

    folder: Path
    events: list[tuple[float, bytes]] = field(default_factory=list)
    screens: list[str] = field(default_factory=list)

    @contextmanager
    def run(self, *arguments: str) -> Iterator[Terminal]:
        """A chat until Ctrl-D."""
        home = {"HOME": str(self.folder), "XDG_STATE_HOME": str(self.folder / "state")}
        here = self.folder / "here"
        here.mkdir(exist_ok=True)
        with Terminal(
            ["chat", "-t", "0", *arguments], COLUMNS, ROWS, environment=home, cwd=here
        ) as terminal:
            terminal.wait_for_prompt()
            yield terminal
            self.screens.append(OPENING.sub("", terminal.text))
            terminal.send(CTRL_D)
            assert terminal.end() == 0
        before = self.events[-1][0] + STEP_S if self.events else 0.0
        # Each prompt is a step; the line editor asks for the cursor when it begins one.
        steps = 0
        for time, data in terminal.output:
            steps += data.count(b"\x1b[6n")
            self.events.append((before + time + STEP_S * steps, data))

    @property
    def text(self) -> str:
        """What a person saw, without what loading says, and with an endless answer cut short."""
        screen = "\n".join(f"$ apertus-mlx chat\n{screen}" for screen in self.screens)
        return ENDLESS.sub((RING * 3).rstrip() + " ...", screen)

    def write(self, path: Path, title: str) -> None:
        """Write it as asciicast v2."""
        header = {"version": 2, "width": COLUMNS, "height": ROWS, "title": title}
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        lines = [json.dumps(header)]
        for time, data in self.events:
            lines.append(json.dumps([round(time, 3), "o", decoder.decode(data)]))
        path.write_text("\n".join(lines) + "\n")


def several_lines(recording: Recording) -> None:
    """A paste is one message; a backslash or Alt-Enter begins another line"""
    with recording.run() as terminal:
        terminal.paste("What is the capital\nof France?")
        terminal.press("", "> What is the capital", "  of France?")
        terminal.enter()
        terminal.press(f"What is the capital\\{ENTER}of Italy?",
                       "> What is the capital", "  of Italy?")  # fmt: skip
        terminal.enter()
        terminal.press(f"What is the capital{ALT_ENTER}of Spain?",
                       "> What is the capital", "  of Spain?")  # fmt: skip
        terminal.enter()


def interrupts(recording: Recording) -> None:
    """Ctrl-C stops an answer, clears a line, and on an empty one says how to leave"""
    model = write_endless_model(recording.folder / "model", RING)
    with recording.run("--model", str(model), "-n", "1000000") as terminal:
        terminal.send(f"How does the world go?{ENTER}")
        terminal.wait_for(RING * 5)
        terminal.send(CTRL_C)
        terminal.wait_for("stopped")
        terminal.wait_for_prompt(beyond=1)
        terminal.press("Why does it", "> Why does it")
        terminal.press(CTRL_C, ">")
        terminal.send(CTRL_C)
        terminal.wait_for_prompt(beyond=2)


def history(recording: Recording) -> None:
    """Up finds in the next run what was typed in this one"""
    with recording.run() as terminal:
        terminal.enter("What is the capital of France?")
    with recording.run() as terminal:
        terminal.press(UP, "> What is the capital of France?")
        terminal.enter()


def commands(recording: Recording) -> None:
    """Commands say what they did"""
    with recording.run() as terminal:
        terminal.enter("What is the capital of Italy?")
        terminal.press(f"/ret{TAB}", "> /retry")
        terminal.enter()
        for line in ("/system Be brief.", "/think on", "What is the capital of Spain?",
                     "/save talk.json", "/undo", "/reset", "/load talk.json", "/think off",
                     "/usr", "/help"):  # fmt: skip
            terminal.enter(line)


RECORDINGS: dict[str, Callable[[Recording], None]] = {
    each.__name__.replace("_", "-"): each for each in (several_lines, interrupts, history, commands)
}


def record(name: str, folder: Path) -> Recording:
    """Play one of `RECORDINGS` in `folder`."""
    recording = Recording(folder)
    RECORDINGS[name](recording)
    return recording


def main(target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for name, play in RECORDINGS.items():
        with tempfile.TemporaryDirectory() as folder:
            recording = record(name, Path(folder))
        title = str(play.__doc__)
        recording.write(target / f"{name}.cast", title)
        print(f"{title}:\n\n```\n{recording.text}\n```\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
