"""What begins with a slash in a chat: commands, each of which says what it did."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from apertus_mlx.cli import several
from apertus_mlx.cli.generate import summary
from apertus_mlx.errors import UsageError
from apertus_mlx.generation.request_files import read_messages, write_messages
from apertus_mlx.system.model_files import exists

if TYPE_CHECKING:
    from apertus_mlx.generation.conversation import Conversation
    from apertus_mlx.text.template import Message

KEYS = r"""\ at the end of a line, or Alt-Enter, begins another line of the message.
// at the front sends a message that begins with a slash.
Ctrl-C stops an answer, or clears the line; Ctrl-D on an empty line leaves."""


class Request(NamedTuple):
    """What somebody typed: a command and what stands behind it, or no command and a message."""

    command: str | None
    text: str


class ChatCommands:
    """The commands of one chat.

    Attributes:
        ended: whether somebody asked to leave.
    """

    def __init__(self, conversation: Conversation, answer_again: Callable[[], None]) -> None:
        """Take over `conversation`; `answer_again` prints a new answer to its last question."""
        self.ended = False
        self._conversation = conversation
        self._answer_again = answer_again
        # What `/save` wrote or `/load` read last.
        self._file: Path | None = None

    def run(self, request: Request) -> str | None:
        """Do what `request` says; returns what to tell, a line except for `/help`.

        Raises:
            ApertusError, OSError: it cannot be done; the conversation is as it was.
        """
        name, text = request
        command = COMMANDS.get(name or "")
        if command is None:
            raise UsageError(
                f"{name}: unknown; /help lists the commands, and /{name} sends it as a message"
            )
        if text and not command.takes:
            raise UsageError(f"{name} takes no text; /{name} {text} sends all of it as a message")
        return command.function(self, text)

    def _help(self, _: str) -> str:
        return f"{HELP}\n\n{KEYS}"

    def _undo(self, _: str) -> str:
        if not self._conversation.undo():
            raise UsageError("there is nothing to undo")
        left = _count(self._conversation.questions, "question")
        return f"forgot the last question and its answer; {left} left"

    def _retry(self, _: str) -> None:
        if self._conversation.last_question is None:
            raise UsageError("there is nothing to retry")
        self._answer_again()

    def _reset(self, _: str) -> str:
        self._conversation.reset()
        kept = "" if self._conversation.system is None else "; the system message stays"
        return f"forgot the conversation{kept}"

    def _system(self, text: str) -> str:
        now = self._conversation.system
        if not text:
            return "there is no system message" if now is None else f"the system message is: {now}"
        self._conversation.system = None if text == "off" else text
        return "removed the system message" if text == "off" else "set the system message"

    def _think(self, text: str) -> str:
        if text not in ("", "on", "off"):
            raise UsageError(f"/think {text[:40]}: expected on or off")
        if text:
            self._conversation.think = text == "on"
        does = "deliberates" if self._conversation.think else "does not deliberate"
        return f"the model {does} before it answers"

    def _stats(self, _: str) -> str:
        last = self._conversation.last_answer
        if last is None:
            return "nothing has been answered yet"
        context = last.prompt_tokens + last.generated_tokens
        return f"{summary(last)}; context {context} of {self._conversation.context_length} tokens"

    def _save(self, text: str, replace: bool = False) -> str | None:
        if not several.speaks():
            return None
        if not self._conversation.messages:
            raise UsageError("there is nothing to save")
        path = self._path("/save", text)
        known = self._file is not None and path.resolve() == self._file.resolve()
        if exists(path) and not path.is_file():
            raise UsageError(f"{path}: is there already, and is no file; give another name")
        if exists(path) and not known and not replace:
            raise UsageError(f"{path}: is there already; /save! {text} replaces it")
        write_messages(path, self._conversation.messages)
        self._file = path
        return f"saved {_count(len(self._conversation.messages), 'message')} to {path}"

    def _save_over(self, text: str) -> str | None:
        return self._save(text, replace=True)

    def _load(self, text: str) -> str:
        name, messages = json.loads(several.of_rank_0(lambda: json.dumps(self._read(text))))
        path = Path(name)
        self._conversation.load(messages)
        self._file = path
        open_end = "; /retry answers the last" if messages[-1]["role"] == "user" else ""
        return f"loaded {_count(len(messages), 'message')} from {path}{open_end}"

    def _read(self, text: str) -> tuple[str, list[Message]]:
        """The file that `/load` names, and the messages in it."""
        path = self._path("/load", text)
        return str(path), read_messages(path)

    def _exit(self, _: str) -> None:
        self.ended = True

    def _path(self, command: str, text: str) -> Path:
        if text:
            return Path(os.path.expanduser(text))  # noqa: PTH111 (never raises)
        if self._file is None:
            raise UsageError(f"{command} needs the name of a file")
        return self._file


class _Command(NamedTuple):
    function: Callable[[ChatCommands, str], str | None]
    words: str
    # What may stand behind it, for people.
    takes: str = ""


COMMANDS = {
    "/undo": _Command(ChatCommands._undo, "forget the last question and its answer"),
    "/retry": _Command(ChatCommands._retry, "answer the last question again"),
    "/reset": _Command(ChatCommands._reset, "forget all but the system message"),
    "/system": _Command(ChatCommands._system, "show or set the system message", "[TEXT|off]"),
    "/think": _Command(ChatCommands._think, "let the model deliberate first", "[on|off]"),
    "/save": _Command(ChatCommands._save, "write the messages as JSON; /save! replaces", "FILE"),
    "/save!": _Command(ChatCommands._save_over, "", "FILE"),
    "/load": _Command(ChatCommands._load, "go on from messages in a file", "FILE"),
    "/stats": _Command(ChatCommands._stats, "tell what the last answer took"),
    "/help": _Command(ChatCommands._help, "list the commands"),
    "/exit": _Command(ChatCommands._exit, "leave"),
}
HELP = "\n".join(
    f"{f'{name} {command.takes}':<22}{command.words}"
    for name, command in COMMANDS.items()
    if command.words
)
# What may follow a command, for completion: a file, or one of some words.
COMPLETIONS: dict[str, Sequence[str] | None] = {
    name: None if command.takes == "FILE" else () for name, command in COMMANDS.items()
} | {"/think": ("on", "off"), "/system": ("off",)}


def read_request(line: str) -> Request:
    """Tell a command from a message; `//` at the front is a message's own slash.

    What has blanks is a message, unless it begins with a command: `/usr/bin is a folder`.
    """
    text = line.strip()
    if text.startswith("//"):
        return Request(None, text[1:])
    first = text.split(None, 1)[0] if text else ""
    if first in COMMANDS or (first.startswith("/") and first == text):
        return Request(first, text[len(first) :].strip())
    return Request(None, line)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
