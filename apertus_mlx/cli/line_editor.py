"""Messages typed in a terminal, edited with prompt_toolkit: pastes, several lines, history."""

from __future__ import annotations

import sys
import termios
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Self, TextIO

from prompt_toolkit import PromptSession
from prompt_toolkit.application import run_in_terminal
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import has_focus
from prompt_toolkit.history import History
from prompt_toolkit.key_binding import KeyBindings
from prompt_toolkit.layout.processors import Processor, Transformation, TransformationInput
from prompt_toolkit.output import create_output
from prompt_toolkit.shortcuts import CompleteStyle

from apertus_mlx.cli import sink

if TYPE_CHECKING:
    from prompt_toolkit.formatted_text import StyleAndTextTuples
    from prompt_toolkit.key_binding import KeyPressEvent

    from apertus_mlx.cli.chat_history import ChatHistory

PROMPT = "> "
CONTINUATION = "  "


class LineEditor:
    """Reads messages from the terminal on standard input.

    Enter sends; behind a backslash it begins a new line, as Alt-Enter does. A paste is one message
    however many lines it has. Up and Down find what was typed before, Tab completes. Ctrl-C clears
    the line; on an empty one `on_interrupt` is called.

    Args:
        words: by the first word of a message, what may follow: words, or None for a file.
        on_interrupt: is called while the prompt stands aside.
        history: where messages are kept between runs.
    """

    def __init__(
        self,
        words: dict[str, Sequence[str] | None],
        on_interrupt: Callable[[], None],
        history: ChatHistory | None,
    ) -> None:
        # The prompt is no data: stdout carries only the model's text.
        self._output = create_output(sys.stderr if sys.stderr.isatty() else sys.stdout)
        self._history = _History(history)
        self._session: PromptSession[str] = PromptSession(
            PROMPT,
            # Enter is ours; this makes Up and Down move between the lines of a message first.
            multiline=True,
            prompt_continuation=CONTINUATION,
            key_bindings=_keys(on_interrupt),
            history=self._history,
            input_processors=[_Shown()],
            completer=_Completer(words),
            complete_style=CompleteStyle.READLINE_LIKE,
            complete_while_typing=False,
            enable_suspend=True,
            output=self._output,
        )

    def read(self) -> str | None:
        """The next message; None at the end (Ctrl-D on an empty line)."""
        try:
            # A signal, unlike the key, may come when the prompt is about to end: it is not ours.
            return self._session.prompt(handle_sigint=False)
        except EOFError:
            return None
        finally:
            self._mark_pastes()
            self._history.save()

    @contextmanager
    def attached(self) -> Iterator[Self]:
        """Keep for the next `read` what is typed or pasted between two, without showing it."""
        with _quiet(sys.stdin):
            self._mark_pastes()
            try:
                yield self
            finally:
                self._output.disable_bracketed_paste()
                self._output.flush()

    def _mark_pastes(self) -> None:
        """Have the terminal say what is a paste; its lines would look like typed ones."""
        self._output.enable_bracketed_paste()
        self._output.flush()


@contextmanager
def _quiet(terminal: TextIO) -> Iterator[None]:
    """Neither echo nor cut lines; Ctrl-C stays an interrupt."""
    descriptor = terminal.fileno()
    before = termios.tcgetattr(descriptor)
    quiet = termios.tcgetattr(descriptor)
    # Enter stays what it is at the prompt, and is no newline.
    quiet[0] &= ~termios.ICRNL
    quiet[3] &= ~(termios.ECHO | termios.ICANON)
    try:
        termios.tcsetattr(descriptor, termios.TCSANOW, quiet)
        yield
    finally:
        with suppress(termios.error):
            termios.tcsetattr(descriptor, termios.TCSANOW, before)


class _History(History):
    """Entries of earlier runs and of this one; the file is touched only where no prompt stands."""

    def __init__(self, file: ChatHistory | None) -> None:
        super().__init__()
        self._file = file
        self._earlier = [] if file is None else file.read()
        self._new: list[str] = []

    def load_history_strings(self) -> Iterable[str]:
        return reversed(self._earlier)

    def store_string(self, string: str) -> None:
        self._new.append(string)

    def save(self) -> None:
        while self._new:
            text = self._new.pop(0)
            if self._file is not None:
                self._file.add(text)


class _Shown(Processor):
    """Shows what would change the order of a line, or end it, as a replacement character.

    A pasted text then looks as it is read by the model. Controls are shown by the line editor.
    """

    def apply_transformation(self, transformation_input: TransformationInput) -> Transformation:
        shown: StyleAndTextTuples = [
            (style, sink.ORDERS.sub(lambda found: _as_one(found[0]), text))
            for style, text, *_ in transformation_input.fragments
        ]
        return Transformation(shown)


def _as_one(character: str) -> str:
    return character if character < "\xa0" else "\ufffd"


class _Completer(Completer):
    def __init__(self, words: dict[str, Sequence[str] | None]) -> None:
        self._words = words
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, event: CompleteEvent) -> Iterable[Completion]:
        text = document.text_before_cursor
        first, blank, rest = text.partition(" ")
        following = self._words.get(first, ()) if blank else tuple(self._words)
        if following is None:
            for found in self._paths.get_completions(Document(rest, len(rest)), event):
                # A name is a stranger's, and is shown as it is.
                if found.text.isprintable() and found.display_text.isprintable():
                    yield found
            return
        typed = rest if blank else first
        if typed or blank:
            yield from (Completion(w, -len(typed)) for w in following if w.startswith(typed))


def _keys(on_interrupt: Callable[[], None]) -> KeyBindings:
    keys = KeyBindings()
    # Not while Ctrl-R searches.
    typing = has_focus(DEFAULT_BUFFER)

    @keys.add("enter", filter=typing)
    def enter(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if not buffer.text.endswith("\\"):
            buffer.validate_and_handle()
            return
        buffer.cursor_position = len(buffer.text)
        buffer.delete_before_cursor()
        buffer.newline(copy_margin=False)

    @keys.add("escape", "enter", filter=typing)
    def alt_enter(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    @keys.add("c-c", filter=typing)
    def interrupt(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            run_in_terminal(on_interrupt)

    return keys
