"""`apertus-mlx chat`: a conversation in the terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from apertus_mlx.cli import cache_options, options, sink
from apertus_mlx.cli.generate import summary
from apertus_mlx.cli.output import note, print_data, print_pieces
from apertus_mlx.cli.prompt_text import open_lines, require_short

if TYPE_CHECKING:
    from apertus_mlx.generation.run import Speaker
    from apertus_mlx.generation.sampling import SamplingParams
    from apertus_mlx.memory import Fit

# Memory is planned for a conversation of so many tokens, or the model's context if shorter.
CHAT_CONTEXT = 8192
HELP = """/undo    forget the last question and its answer
/retry   answer the last question again
/reset   start over
/stats   what the last answer took
/exit    leave (or Ctrl-D); a line that ends with \\ continues on the next"""


def chat(
    model: options.ModelOption = None,
    revision: options.RevisionOption = None,
    offline: options.OfflineOption = False,
    system: options.SystemOption = None,
    think: options.ThinkOption = False,
    max_tokens: options.MaxTokensOption = 1024,
    temperature: options.TemperatureOption = None,
    top_p: options.TopPOption = None,
    top_k: options.TopKOption = None,
    min_p: options.MinPOption = None,
    repetition_penalty: options.RepetitionPenaltyOption = None,
    seed: options.SeedOption = None,
    stop: options.StopOption = None,
    dtype: options.DTypeOption = None,
    compute: options.ComputeOption = options.Compute.AUTO,
    precision: options.PrecisionOption = options.Precision.AUTO,
    kv_bits: cache_options.KvBitsOption = None,
    kv_bits_v: cache_options.KvBitsVOption = None,
    max_kv: cache_options.MaxKvOption = None,
    kv_sink: cache_options.KvSinkOption = None,
    kv_rotate: cache_options.KvRotateOption = None,
    prefill_step: cache_options.PrefillStepOption = None,
    memory_limit: cache_options.MemoryLimitOption = None,
    force: cache_options.ForceOption = False,
) -> None:
    """Talk with a model; earlier turns are not computed again. /help lists what it understands."""
    from apertus_mlx.checkpoint.generation_config import GenerationConfig
    from apertus_mlx.cli.model_source import locate_model, open_speaker
    from apertus_mlx.generation.sampling import resolve_params

    def choose(config: GenerationConfig) -> SamplingParams:
        return resolve_params(
            config,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
        )

    choose(GenerationConfig())
    open_lines()
    form = cache_options.read_cache_form(kv_bits, kv_bits_v, max_kv, kv_sink, kv_rotate)
    request = cache_options.read_memory_request(form, prefill_step, memory_limit, force)
    dtype_name = dtype.value if dtype else None
    directory = locate_model(model, revision, offline)
    with cache_options.MemoryGuard(request, dtype_name, compute.value, precision.value) as memory:
        speaker = open_speaker(
            directory,
            dtype_name,
            compute,
            precision,
            lambda inventory, *_: memory.choose(inventory, CHAT_CONTEXT),
        )
        params = choose(speaker.generation_config)
        _converse(speaker, system, think, memory.fit, params, max_tokens, stop or ())


def _converse(
    speaker: Speaker,
    system: str | None,
    think: bool,
    fit: Fit,
    params: SamplingParams,
    max_tokens: int,
    stop: Sequence[str],
) -> None:
    from apertus_mlx.errors import UsageError
    from apertus_mlx.generation.conversation import Conversation

    conversation = Conversation(speaker, system, think, fit.form)
    note("type a message; /help for more")

    def answer(question: str | None) -> None:
        settings = (params, max_tokens, stop, fit.prefill_step)
        if question is None:
            pieces = conversation.retry(*settings)
        else:
            require_short(question, speaker.tokenizer, speaker.context_length)
            pieces = conversation.ask(question, *settings)
        with contextlib.suppress(KeyboardInterrupt), contextlib.closing(pieces):
            print_pieces(pieces)
        print_data("")

    while (line := _read_line()) is not None:
        command = line.strip()
        try:
            if command == "/exit":
                break
            if command == "/help":
                sink.note(HELP, keep=sink.LAYOUT)
            elif command == "/reset":
                conversation = Conversation(speaker, system, think, fit.form)
            elif command == "/undo":
                if not conversation.undo():
                    note("there is nothing to undo")
            elif command == "/retry":
                if conversation.last_question is None:
                    note("there is nothing to retry")
                else:
                    answer(None)
            elif command == "/stats":
                result = conversation.last_result
                note(summary(result) if result else "nothing has been answered yet")
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
