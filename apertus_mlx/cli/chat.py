"""`apertus-mlx chat`: a conversation in the terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from apertus_mlx.cli import options, sink
from apertus_mlx.cli.generate import summary
from apertus_mlx.cli.output import print_pieces
from apertus_mlx.cli.prompt_text import open_lines
from apertus_mlx.cli.sink import note
from apertus_mlx.generation.options import CHAT_CONTEXT, RunOptions, SamplingOptions

if TYPE_CHECKING:
    from apertus_mlx.generation.conversation import Conversation

HELP = """/undo    forget the last question and its answer
/retry   answer the last question again
/reset   start over
/stats   what the last answer took
/exit    leave (or Ctrl-D); a line that ends with \\ continues on the next"""


def chat(
    *,
    model: options.ModelOption = None,
    system: options.SystemOption = None,
    think: options.ThinkOption = False,
    output_filter: options.OutputFilterOption = None,
    sampling: SamplingOptions,
    settings: RunOptions,
) -> None:
    """Talk with a model; earlier turns are not computed again. /help lists what it understands."""
    from apertus_mlx.backend.memory_limits import mlx_limits
    from apertus_mlx.cli.model_source import load_weights, open_model, plan_run
    from apertus_mlx.generation.conversation import Conversation
    from apertus_mlx.text.output_filter import load_output_filter

    open_lines()
    chosen = None if output_filter is None else load_output_filter(output_filter)
    folder = open_model(model, settings)
    plan = plan_run(folder.inventory, settings, CHAT_CONTEXT)
    with mlx_limits(plan.buffer_cache_bytes, plan.wired_bytes):
        loaded = replace(load_weights(folder, settings), output_filter=chosen)
        _converse(
            lambda: Conversation(loaded, system, think, plan.form), sampling, plan.prefill_step
        )


def _converse(start: Callable[[], Conversation], sampling: SamplingOptions, step: int) -> None:
    from apertus_mlx.errors import UsageError

    conversation = start()
    note("type a message; /help for more")

    def answer(question: str | None) -> None:
        if question is None:
            pieces = conversation.retry(sampling, step)
        else:
            pieces = conversation.ask(question, sampling, step)
        with contextlib.suppress(KeyboardInterrupt), contextlib.closing(pieces):
            print_pieces(pieces)

    while (line := _read_line()) is not None:
        command = line.strip()
        try:
            if command == "/exit":
                break
            if command == "/help":
                sink.note(HELP, keep=sink.LAYOUT)
            elif command == "/reset":
                conversation = start()
            elif command == "/undo":
                if not conversation.undo():
                    note("there is nothing to undo")
            elif command == "/retry":
                if conversation.last_question is None:
                    note("there is nothing to retry")
                else:
                    answer(None)
            elif command == "/stats":
                last = conversation.last_answer
                note(summary(last) if last else "nothing has been answered yet")
            elif command.startswith("/") and " " not in command:
                note(f"{command}: unknown; /help lists the commands")
            elif command:
                answer(line)
        except UsageError as error:
            note(f"error: {error}; /undo or /reset makes room")


def _read_line() -> str | None:
    """One message, with line editing and history where there is a terminal; None at the end."""
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (gives `input` editing and history)
    lines: list[str] = []
    try:
        while True:
            prompt = ("> " if not lines else "  ") if sys.stdin.isatty() else ""
            # The prompt goes to stderr, so that stdout carries only the model's text.
            line = _input(prompt)
            if not line.endswith("\\"):
                return "\n".join([*lines, line])
            lines.append(line[:-1])
    except EOFError:
        return "\n".join(lines) if lines else None


def _input(prompt: str) -> str:
    if sys.stdin.isatty() and sys.stdout.isatty():
        return input(prompt)
    if prompt:
        sink.note(prompt, end="")
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.removesuffix("\n")
