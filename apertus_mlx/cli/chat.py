"""`apertus-mlx chat`: a conversation in the terminal."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from apertus_mlx.cli import options, several, sink
from apertus_mlx.cli.chat_commands import ChatCommands, Request, read_request
from apertus_mlx.cli.chat_lines import Lines, open_chat_lines
from apertus_mlx.cli.output import print_pieces
from apertus_mlx.cli.prompt_text import open_lines
from apertus_mlx.cli.sink import note
from apertus_mlx.cli.tool_options import ToolChoiceOption, ToolsOption, read_tool_options
from apertus_mlx.errors import TooLongError, UsageError
from apertus_mlx.generation.options import (
    CHAT_CONTEXT,
    NO_DRAFT,
    DraftOptions,
    RunOptions,
    SamplingOptions,
)
from apertus_mlx.system.arguments import Option
from apertus_mlx.system.foreign_errors import explain
from apertus_mlx.text.template_process import TEMPLATES

if TYPE_CHECKING:
    from apertus_mlx.generation.conversation import Conversation
    from apertus_mlx.generation.run import Piece, ToolCall
    from apertus_mlx.text.template import Message

# Characters of a call that are repeated where its result is asked for.
MOST_SHOWN = 100
NoHistoryOption = Annotated[
    bool, Option("Do not keep what is typed for the next run, nor read what is kept.")
]


def chat(
    *,
    model: options.ModelOption = None,
    system: options.SystemOption = None,
    think: options.ThinkOption = False,
    tools: ToolsOption = None,
    tool_choice: ToolChoiceOption = "auto",
    output_filter: options.OutputFilterOption = None,
    no_history: NoHistoryOption = False,
    sampling: SamplingOptions,
    settings: RunOptions,
    draft: DraftOptions = NO_DRAFT,
) -> None:
    """Talk with a model; earlier turns are not computed again. /help lists what it understands."""
    TEMPLATES.start()
    from apertus_mlx.backend.memory_limits import mlx_limits
    from apertus_mlx.cli.model_source import (
        load_draft,
        load_weights,
        open_draft,
        open_model,
        plan_run,
    )
    from apertus_mlx.generation.conversation import Conversation
    from apertus_mlx.text.output_filter import load_output_filter

    open_lines()
    toolset = read_tool_options(tools, tool_choice)
    chosen = None if output_filter is None else load_output_filter(output_filter)
    folder = open_model(model, settings)
    folder.require_place(think, toolset.definitions)
    helper = open_draft(folder, draft, settings)
    plan = plan_run(folder.inventory, settings, CHAT_CONTEXT, helper)
    with mlx_limits(plan.buffer_cache_bytes, plan.wired_bytes):
        loaded = replace(load_weights(folder, settings), output_filter=chosen)
        loaded = load_draft(loaded, helper, draft, settings)
        conversation = Conversation(loaded, system, think, plan.form, toolset)
        with open_chat_lines(lambda: note("Ctrl-D ends the chat"), not no_history) as lines:
            _Talk(conversation, lines, sampling, plan.prefill_step).run()


class _Talk:
    """Messages and commands, one after the other, until they end."""

    def __init__(
        self, conversation: Conversation, lines: Lines, sampling: SamplingOptions, step: int
    ) -> None:
        self._conversation = conversation
        self._lines = lines
        self._how = sampling, step
        self._commands = ChatCommands(conversation, self._retry)
        # Of calls of the last message, by their ids; and which message that was.
        self._results: dict[str, str] = {}
        self._asking: Message | None = None
        # Ctrl-C, counted while an answer is computed.
        self._interrupts = 0

    def run(self) -> None:
        note("type a message; /help for more")
        while not self._commands.ended and (line := self._next_line()) is not None:
            request = read_request(line)
            if request.command is not None:
                self._command(request)
            elif request.text.strip() or self._waiting():
                # A result may be empty, a question may not.
                self._take(request.text)

    def _next_line(self) -> str | None:
        if waiting := self._waiting():
            call = f"{waiting[0].name} {waiting[0].arguments}"
            shown = call if len(call) <= MOST_SHOWN else f"{call[:MOST_SHOWN]}..."
            note(f"what does {shown} give?")
        return self._lines.read()

    def _waiting(self) -> list[ToolCall]:
        """The calls whose results have not been typed."""
        last = self._conversation.messages[-1] if self._conversation.messages else None
        if self._asking is not last:
            # `/load` may bring other calls, also with the same ids.
            self._asking, self._results = last, {}
        return [call for call in self._conversation.open_calls if call.id not in self._results]

    def _take(self, text: str) -> None:
        """Take a message, or the result of a call."""
        waiting = self._waiting()
        if not waiting:
            self._answer(partial(self._conversation.ask, text), text)
            return
        self._results[waiting[0].id] = text
        if len(waiting) == 1:
            # After an error all of them are asked for again.
            results, self._results = self._results, {}
            self._answer(partial(self._conversation.give, results))

    def _command(self, request: Request) -> None:
        try:
            told = self._commands.run(request)
        except Exception as error:
            if (known := explain(error)) is None:
                raise
            note(str(known) if isinstance(known, UsageError) else f"error: {known}")
        else:
            if told is not None:
                note(told, keep=sink.LAYOUT if request.command == "/help" else "")

    def _retry(self) -> None:
        note("answering the last question again")
        self._answer(self._conversation.retry)

    def _answer(
        self, start: Callable[..., Generator[Piece, None, None]], question: str | None = None
    ) -> None:
        try:
            with (
                nullcontext() if several.is_one_of_many() else suppress(KeyboardInterrupt),
                self._interruptible() as interrupted,
                closing(start(*self._how, interrupted)) as pieces,
            ):
                print_pieces(pieces)
        except Exception as error:
            known = explain(error)
            if isinstance(known, UsageError):
                helps = (
                    isinstance(known, TooLongError)
                    and question is not None
                    and self._conversation.fits_alone(question)
                )
                note(f"error: {known}{'; /undo or /reset makes room' if helps else ''}")
                return
            # Whoever sits there can still save what has been said; but other ranks may go on.
            at_terminal = sys.stdin.isatty() and sys.stdout.isatty()
            if known is None or not at_terminal or several.is_one_of_many():
                raise
            note(f"error: {known}")
        if self._interrupts:
            self._tell_stopped()

    def _tell_stopped(self) -> None:
        last = self._conversation.last_answer
        if last is not None and last.finish_reason == "cancelled":
            kept = "what was said stays in the conversation" if last.text else "nothing was said"
            note(f"stopped; {kept}; /retry answers again")

    @contextmanager
    def _interruptible(self) -> Iterator[Callable[[], bool]]:
        """Count interrupts: the first ends an answer behind a token, the second at once.

        Behind a token the cache keeps all that was computed, in whatever form.
        """

        def interrupt(*_: Any) -> None:
            self._interrupts += 1
            # One more could come while this one is on its way out. Of several ranks all end behind
            # the same token: there the second one ends the chat.
            if self._interrupts == 2:
                raise KeyboardInterrupt

        self._interrupts = 0
        before = signal.signal(signal.SIGINT, interrupt)
        try:
            yield lambda: self._interrupts > 0
        finally:
            signal.signal(signal.SIGINT, before)
