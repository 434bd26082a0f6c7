"""The Python API: find a model, load it, and ask it.

    from apertus_mlx import load
    model = load("swiss-ai/Apertus-v1.1-0.5B-Instruct")
    print(model.generate("What is the capital of France?", temperature=0).text)

Nothing here prints. Errors are those of `apertus_mlx.errors`; a value of a wrong type is a
TypeError that begins with the argument's name.
"""

from __future__ import annotations

import logging
import math
import os
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar, Unpack, cast

import mlx.core as mx
import mlx.nn as nn

from apertus_mlx import hub
from apertus_mlx.backend.hardware import has_gpu
from apertus_mlx.backend.memory_limits import mlx_limits
from apertus_mlx.backend.ranks import is_launched
from apertus_mlx.errors import UsageError
from apertus_mlx.generation.cached_prefix import CachedPrefix
from apertus_mlx.generation.conversation import Conversation
from apertus_mlx.generation.draft_model import load_drafting, require_draft
from apertus_mlx.generation.memory_plan import describe_plan, plan_draft, plan_memory, report_plan
from apertus_mlx.generation.model_folder import LoadedModel, ModelFolder, open_folder
from apertus_mlx.generation.options import (
    CHAT_CONTEXT,
    DraftOptions,
    RunKeywords,
    RunOptions,
    SamplingKeywords,
    SamplingOptions,
)
from apertus_mlx.generation.run import Answer, Generation, Piece, ToolCall
from apertus_mlx.generation.tool_set import Tool, ToolSet, read_tool_set
from apertus_mlx.generation.turns import Turn, Turns, Work
from apertus_mlx.memory import Fit
from apertus_mlx.system.arguments import Option, Range, checked, expect, known
from apertus_mlx.system.foreign_errors import own_errors
from apertus_mlx.system.progress import OnProgress, Progress
from apertus_mlx.text.output_filter import OutputFilter, load_output_filter
from apertus_mlx.text.template import Message
from apertus_mlx.text.template_process import TEMPLATES

__all__ = [
    "Answer", "Apertus", "Chat", "Message", "Piece", "Progress", "Stream", "ToolCall", "load",
]  # fmt: skip

# What the package logs reaches a program's own handlers, never stderr unasked.
logging.getLogger("apertus_mlx").addHandler(logging.NullHandler())

# Positions whose logits are computed at a time for `logprobs`: 131,072 float32 numbers each.
_LOGITS_STEP = 32

# A conversation; see `Message`.
Messages = Sequence[Mapping[str, object]]
T = TypeVar("T")
# Pieces of an answer, and what tells the answer so far.
_Begun = tuple[Generator[Piece, None, None], Callable[[], Answer | None]]
# The process whose models these are; MLX's threads are not there in a forked one.
_process: int | None = None


def _require_process() -> None:
    global _process  # noqa: PLW0603
    _process = _process or os.getpid()
    if _process != os.getpid():
        raise UsageError("MLX does not work in the fork of a process that used it; use spawn")


@checked
def load(
    model: str | os.PathLike[str] | None = None,
    *,
    context: Annotated[int | None, Option("Tokens to plan for.", Range(1, 2**31))] = None,
    progress: OnProgress | None = None,
    output_filter: str | os.PathLike[str] | OutputFilter | None = None,
    draft: str | os.PathLike[str] | None = None,
    draft_vocab: int | None = None,
    **options: Unpack[RunKeywords],
) -> Apertus:
    """Find a model, check its files, plan its memory, and load its weights.

    Args:
        model: a Hub id (`organisation/name`), a folder, or None for the small demonstration model
            in the package.
        context: tokens of prompt and answer together that memory is planned for; 8,192, or the
            model's context if that is shorter, by default.
        progress: told of the stages `downloading`, from another thread, and `loading`, in bytes.
        output_filter: what answers go through: a file of rules, the name of an installed filter, or
            a filter; see docs/output-filter.md.
        draft: a small model of the same ids, as `model`, that guesses tokens for this one to check
            several at a time, or "lookup": what the text itself repeats; see docs/speculation.md.
        draft_vocab: the draft guesses the first so many ids alone.
        **options: the fields of `RunOptions`, which are the command line's options:
            `memory_limit="1.2GB"`, `kv_bits=8`, `compute="mlx"`, ...

    Raises:
        NotFoundError: there is no such model, or it cannot be reached.
        RejectedError: a file of it is damaged or not supported.
        ResourceError: too little memory or disk.
        TypeError: a value of a wrong type, or an unknown option.
        UsageError: a value out of range, or one of several processes of `mlx.launch`.
    """
    _require_process()
    if is_launched():
        raise UsageError(
            "load: computes on one machine; under mlx.launch start a command of apertus-mlx"
        )
    TEMPLATES.start()
    settings = RunOptions(**known(RunOptions, options))
    chosen = None if output_filter is None else load_output_filter(output_filter)
    report = progress or (lambda _: None)
    if settings.pipeline:
        raise UsageError("pipeline: splits a model over the machines of mlx.launch")
    drafts = DraftOptions(draft=draft, draft_vocab=draft_vocab)
    folder = open_folder(
        hub.locate(model, revision=settings.revision, offline=settings.offline, progress=progress)
    )
    context = context or CHAT_CONTEXT
    helper, beside = None, 0
    if drafts.model is not None:
        helper = open_folder(hub.locate(drafts.model, offline=settings.offline, progress=progress))
        require_draft(folder, helper)
        beside = plan_draft(helper.inventory, settings, context)
    plan = plan_memory(folder.inventory, settings, context, beside)
    notes = list(folder.notes)
    if (line := describe_plan(plan, settings, context)) is not None:
        notes.append(line)
    if not has_gpu():
        notes.append("MLX has no GPU on this machine: computing on the CPU")
    with ExitStack() as stack:
        stack.enter_context(mlx_limits(plan.buffer_cache_bytes, plan.wired_bytes))
        # MLX's usual streams belong to one thread; this one may be used by any, one at a time.
        stream = mx.new_thread_unsafe_stream(mx.gpu if has_gpu() else mx.cpu)
        with mx.stream(stream):
            loaded = folder.load(
                settings, lambda done, total: report(Progress("loading", done, total, "bytes"))
            )
            drafting = load_drafting(folder, helper, drafts, settings)
        size_bytes = folder.inventory.checkpoint.size_bytes
        report(Progress("loading", size_bytes, size_bytes, "bytes"))
        loaded = replace(loaded, output_filter=chosen, drafting=drafting)
        return Apertus(loaded, plan, notes, stream, stack.pop_all())


class Apertus:
    """A loaded model; any thread may use it, and calls queue. Made by `load`.

    Attributes:
        notes: what the command line would say while it loads: files that are not used, settings
            that memory has forced, a missing GPU.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        plan: Fit,
        notes: Sequence[str],
        stream: mx.Stream,
        limits: ExitStack,
    ) -> None:
        """Take over a model; use `load`."""
        self.notes = list(notes)
        self._loaded: LoadedModel | None = loaded
        self._plan = plan
        self._stream = stream
        self._limits = limits
        self._turns = Turns()
        self._closed = False

    def __repr__(self) -> str:
        return f"<Apertus {'closed' if self._loaded is None else self._loaded.folder.directory}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> str:
        raise TypeError("a loaded model cannot be copied or pickled; load it again from its folder")

    @property
    def directory(self) -> Path:
        """The model's folder."""
        return self._folder.directory

    @property
    def context_length(self) -> int:
        """The most tokens that prompt and answer may have together."""
        return self._folder.context_length

    @property
    def memory(self) -> dict[str, Any]:
        """Form of the cache, prefill step, limit and planned bytes, as `generate --json` has it."""
        return report_plan(self._plan)

    @property
    def model(self) -> nn.Module:
        """The MLX module, which functions of mlx-lm accept; see docs/python.md for which.

        Raises:
            UsageError: the CPU path computes this model.
        """
        model = self._open().model
        if not isinstance(model, nn.Module):
            raise UsageError(
                'this model is computed without MLX\'s modules; load it with compute="mlx"'
            )
        return model

    def generate(
        self,
        prompt: str | Messages,
        *,
        system: str | None = None,
        think: bool = False,
        raw: bool = False,
        tools: Sequence[Tool] | None = None,
        tool_choice: str = "auto",
        **sampling: Unpack[SamplingKeywords],
    ) -> Answer:
        """Answer a question, or the last message of a conversation.

        Args:
            prompt: a text, or messages such as `{"role": "user", "content": "..."}`.
            system: a system message to put first.
            think: whether the model deliberates before it answers.
            raw: continue a text as it is, without the model's chat template.
            tools: what the model may call: Python functions, see `tool_schema`, or definitions as
                OpenAI's API takes them. Nothing is called; `tool_calls` of the answer tells.
            tool_choice: `auto`, `none`, `required`, or the name of the tool that has to be called.
            **sampling: the fields of `SamplingOptions`: `temperature`, `max_tokens`, `stop`, ...

        Raises:
            RejectedError: the chat template refuses the messages, or the weights are damaged.
            TypeError: a value of a wrong type, or an unknown option.
            UsageError: a value out of range, a prompt longer than the model's context, or a
                closed model.
        """
        return _finish(
            self.stream(
                prompt,
                system=system,
                think=think,
                raw=raw,
                tools=tools,
                tool_choice=tool_choice,
                **sampling,
            )
        )

    def stream(
        self,
        prompt: str | Messages,
        *,
        system: str | None = None,
        think: bool = False,
        raw: bool = False,
        tools: Sequence[Tool] | None = None,
        tool_choice: str = "auto",
        **sampling: Unpack[SamplingKeywords],
    ) -> Stream:
        """Answer as `generate` does, piece by piece; other calls wait until the stream ends."""
        toolset = read_tool_set(tools, tool_choice)
        ids = self._prompt_ids("prompt", prompt, system, think, raw, toolset)
        self._folder.require_room(len(ids))
        options = SamplingOptions(**known(SamplingOptions, sampling))

        def begin(cancelled: Callable[[], bool]) -> _Begun:
            loaded = self._open()
            prefix = CachedPrefix(loaded.model, self._plan.form)
            run = Generation(
                loaded,
                ids,
                options,
                self._plan.prefill_step,
                prefix,
                cancelled=cancelled,
                tool_names=toolset.names,
                tools=toolset.grammar,
                think=think,
            )
            return iter(run), lambda: run.answer

        return Stream(self, begin)

    def generate_all(
        self,
        prompts: Sequence[str | Messages],
        *,
        system: str | None = None,
        think: bool = False,
        raw: bool = False,
        tools: Sequence[Tool] | None = None,
        tool_choice: str = "auto",
        **sampling: Unpack[SamplingKeywords],
    ) -> list[Answer]:
        """Answer many prompts one after the other, as `generate` does; one answer for each.

        What a prompt begins with like the one before it is not computed again, unless the cache
        cannot go back so far (`kv_bits` below 16, `max_kv`). After `stop` or `close`, the
        answers that are left are empty.
        """
        expect(Sequence[object], prompts=prompts)
        toolset = read_tool_set(tools, tool_choice)
        every = [
            self._prompt_ids(f"prompts[{index}]", prompt, system, think, raw, toolset)
            for index, prompt in enumerate(prompts)
        ]
        for ids in every:
            self._folder.require_room(len(ids))
        options = SamplingOptions(**known(SamplingOptions, sampling))

        def work(cancelled: Callable[[], bool]) -> Generator[Answer, None, None]:
            loaded = self._open()
            prefix = CachedPrefix(loaded.model, self._plan.form)
            grammar = toolset.grammar
            for ids in every:
                run = Generation(
                    loaded,
                    ids,
                    options,
                    self._plan.prefill_step,
                    prefix,
                    cancelled=cancelled,
                    tool_names=toolset.names,
                    tools=grammar,
                    think=think,
                )
                if not cancelled():
                    deque(run, maxlen=0)
                yield run.answer

        return self._compute(work)

    @checked
    def chat(
        self,
        *,
        system: str | None = None,
        think: bool = False,
        tools: Sequence[Tool] | None = None,
        tool_choice: str = "auto",
        **sampling: Unpack[SamplingKeywords],
    ) -> Chat:
        """Start a conversation, in which no turn is computed twice.

        Args:
            system: a system message to put first.
            think: whether the model deliberates before it answers.
            tools: what the model may call, see `generate`; `Chat.run` calls functions.
            tool_choice: see `generate`. After results no tool has to be called any more.
            **sampling: the fields of `SamplingOptions` for all turns.

        Raises:
            RejectedError: the model has no chat template.
            TypeError, UsageError: see `generate`.
        """
        options = SamplingOptions(**known(SamplingOptions, sampling))
        toolset = read_tool_set(tools, tool_choice)
        with mx.stream(self._stream):
            talk = Conversation(self._open(), system, think, self._plan.form, toolset)
        return Chat(self, talk, options)

    def render(
        self,
        messages: Messages,
        *,
        think: bool = False,
        tools: Sequence[Tool] | None = None,
    ) -> list[int]:
        """The token ids of the prompt that the model's chat template makes of a conversation.

        Args:
            messages: as OpenAI's API takes them.
            think: whether the model deliberates before it answers.
            tools: what it may call, see `generate`.

        Raises:
            RejectedError: there is no template, or it refuses the messages.
            TypeError, UsageError: see `generate`.
        """
        expect(bool, think=think)
        definitions = read_tool_set(tools).definitions
        return self._folder.render(_messages("messages", messages), think, definitions)

    @checked
    def encode(self, text: str) -> list[int]:
        """The token ids of `text`, without BOS; no text becomes a special token."""
        return self._folder.tokenizer.encode(text)

    @checked
    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without the special ones.

        Raises:
            UsageError: an id beyond the vocabulary.
        """
        size = self._folder.tokenizer.vocab_size
        if wrong := [one for one in ids if not 0 <= one < size]:
            raise UsageError(f"ids: {wrong[0]} is no token; there are {size}")
        return self._folder.tokenizer.decode(ids)

    @checked
    def logprobs(self, text: str) -> list[float]:
        """The natural logarithm of each token's probability, given all tokens before it.

        One number for each id of `encode(text)`. The first is that after BOS; of a model without
        BOS it is NaN, since nothing comes before it. Computed in chunks and with the form of cache
        that the model was loaded with.

        Raises:
            TypeError, UsageError: see `generate`; also if `stop` or `close` ends it, or an output
                filter is set: probabilities tell what it hides.
        """
        if self._open().output_filter is not None:
            raise UsageError("logprobs: there are none with an output filter")
        ids = self._folder.encode_raw(text)
        if len(ids) > self.context_length:
            self._folder.require_room(len(ids))

        def work(cancelled: Callable[[], bool]) -> Generator[list[float], None, None]:
            model = self._open().model
            cache = model.make_cache(self._plan.form)
            for start in range(0, len(ids) - 1, self._plan.prefill_step):
                if cancelled():
                    raise UsageError("logprobs was stopped")
                chunk = ids[start : min(start + self._plan.prefill_step, len(ids) - 1)]
                hidden = model.model(mx.array([chunk]), cache)
                for first in range(0, len(chunk), _LOGITS_STEP):
                    part = hidden[:, first : first + _LOGITS_STEP]
                    logits = model.logits(part)[0].astype(mx.float32)
                    following = mx.array(ids[start + first + 1 :][: logits.shape[0]])
                    taken = mx.take_along_axis(logits, following[:, None], axis=-1)[:, 0]
                    yield (taken - mx.logsumexp(logits, axis=-1)).tolist()  # type: ignore[misc]
                mx.clear_cache()

        first = [] if self._folder.tokenizer.bos_id is not None else [math.nan]
        found = [first, *self._compute(work)]
        return [each for part in found for each in part] if text else []

    def stop(self) -> None:
        """End the answer that is being computed, by whichever thread; harmless if there is none.

        The call returns what there was, with finish reason `cancelled`. Calls that wait go on.
        """
        self._turns.stop()

    def close(self) -> None:
        """End what is being computed, wait, give back the memory; a second time does nothing."""
        self._closed = True
        if os.getpid() == _process:
            # A call of this thread, interrupted by this one, gives the memory back itself.
            with suppress(UsageError):
                self._turns.close(self._free)

    def _prompt_ids(
        self,
        name: str,
        prompt: str | Messages,
        system: str | None,
        think: bool,
        raw: bool,
        tools: ToolSet,
    ) -> list[int]:
        expect(str | None, system=system)
        expect(bool, think=think, raw=raw)
        if prompt == "":
            raise UsageError(f"{name}: the prompt is empty")
        return self._folder.prompt_ids(
            prompt if isinstance(prompt, str) else _messages(name, prompt),
            system=system,
            think=think,
            raw=raw,
            tools=tools.definitions,
            name=name,
        )

    def _open(self) -> LoadedModel:
        _require_process()
        loaded = self._loaded
        if loaded is None or self._closed:
            raise UsageError("this model is closed; load it again")
        return loaded

    @property
    def _folder(self) -> ModelFolder:
        return self._open().folder

    def _compute(self, work: Work[T]) -> list[T]:
        """All steps of a piece of work, in turn."""
        return list(Turn(self._turns, self._in_place(work)))

    def _in_place(self, work: Work[T]) -> Work[T]:
        """The same work on this model's stream of MLX; after it a closed model is freed."""

        def steps(cancelled: Callable[[], bool]) -> Generator[T, None, None]:
            try:
                self._open()
                with own_errors(), closing(work(cancelled)) as inner:
                    while True:
                        # Entered anew each time: its reader may use streams of MLX of its own.
                        with mx.stream(self._stream):
                            step = next(inner, None)
                        if step is None:
                            return
                        yield step
            finally:
                if self._closed:
                    self._free()

        return steps

    def _free(self) -> None:
        """Give the weights back; for who has the lock."""
        self._loaded = None
        # A step ahead of the last token may still be under way on it.
        with mx.stream(self._stream):
            self._limits.close()


class Stream(Turn[Piece]):
    """Pieces of one answer, as they become certain.

    The model computes as the stream is read. `close`, letting go of it, or the next call of the
    thread that reads it ends the answer.
    """

    def __init__(self, model: Apertus, begin: Callable[[Callable[[], bool]], _Begun]) -> None:
        """Use `Apertus.stream` or `Chat.stream`."""
        self._told: list[Callable[[], Answer | None]] = []
        super().__init__(model._turns, model._in_place(_answering(begin, self._told)))

    @property
    def answer(self) -> Answer:
        """The whole answer, once the stream has ended; before that, what there is.

        Raises:
            UsageError: nothing has been read yet.
        """
        found = self._told[0]() if self._told else None
        if found is None:
            raise UsageError("nothing of this stream has been read yet")
        return found


class Chat:
    """A conversation; made by `Apertus.chat`."""

    def __init__(
        self, model: Apertus, conversation: Conversation, sampling: SamplingOptions
    ) -> None:
        """Use `Apertus.chat`."""
        self._model = model
        self._conversation = conversation
        self._sampling = sampling

    @property
    def messages(self) -> list[Message]:
        """A copy of all messages so far; thoughts are kept before calls alone."""
        return [cast(Message, dict(message)) for message in self._conversation.messages]

    def ask(self, text: str, **sampling: Unpack[SamplingKeywords]) -> Answer:
        """Add a user's message and return the answer.

        An answer that is ended early stays in the conversation as far as it went.

        Raises:
            RejectedError, TypeError, UsageError: see `Apertus.generate`; if the conversation no
                longer fits the model's context, it stays as it was.
        """
        return _finish(self.stream(text, **sampling))

    @checked
    def stream(self, text: str, **sampling: Unpack[SamplingKeywords]) -> Stream:
        """Answer as `ask` does, piece by piece."""
        if not text:
            raise UsageError("text: a question must not be empty")
        return self._streamed(sampling, lambda *how: self._conversation.ask(text, *how))

    def retry(self, **sampling: Unpack[SamplingKeywords]) -> Answer:
        """Answer the last question again.

        Raises:
            UsageError: there is none.
        """
        return _finish(self._streamed(sampling, self._conversation.retry))

    def give(self, results: Mapping[str, str], **sampling: Unpack[SamplingKeywords]) -> Answer:
        """Go on from an answer that calls tools.

        Args:
            results: of all calls, by their ids.
            **sampling: see `ask`.

        Raises:
            TypeError: a result that is no text.
            UsageError: results of other calls, or see `ask`.
        """
        expect(Mapping, results=results)
        for name, each in results.items():
            expect(str, **{f"results[{name!r:.40}]": each})
        return _finish(
            self._streamed(sampling, lambda *how: self._conversation.give(results, *how))
        )

    @checked
    def run(
        self,
        text: str,
        *,
        max_rounds: Annotated[int, Option("Most rounds of calls.", Range(0, 2**31))] = 8,
        **sampling: Unpack[SamplingKeywords],
    ) -> Answer:
        """Ask, call the functions that the model asks for, tell it their results, and go on.

        What a function raises is told to the model, too, as a text that begins with `error:`, and
        logged. Functions are called one after the other, on this thread; they may use the model.

        Returns:
            The first answer that calls no tool. An answer of which a call is of a tool that is no
            function, or for which no round is left, is returned as it is: `give` goes on from it.

        Raises:
            RejectedError, TypeError, UsageError: see `ask`.
        """
        answer = self.ask(text, **sampling)
        tools = self._conversation.tools
        for _ in range(max_rounds):
            if answer.finish_reason != "tool_calls" or not tools.can_call(answer.tool_calls):
                break
            results = {call.id: tools.answer(call) for call in answer.tool_calls}
            answer = self.give(results, **sampling)
        return answer

    def undo(self) -> bool:
        """Forget the last question and its answer; returns whether there was one."""

        def work(_: Callable[[], bool]) -> Generator[bool, None, None]:
            yield self._conversation.undo()

        return self._model._compute(work)[0]

    def _streamed(
        self, sampling: Mapping[str, Any], answer: Callable[..., Generator[Piece, None, None]]
    ) -> Stream:
        options = replace(self._sampling, **known(SamplingOptions, sampling))

        def begin(cancelled: Callable[[], bool]) -> _Begun:
            before = self._conversation.run

            def latest() -> Answer | None:
                run = self._conversation.run
                return None if run is None or run is before else run.answer

            return answer(options, self._model._plan.prefill_step, cancelled), latest

        return Stream(self._model, begin)


def _answering(
    begin: Callable[[Callable[[], bool]], _Begun], told: list[Callable[[], Answer | None]]
) -> Work[Piece]:
    """The work on an answer; `told` gets what tells the answer so far, at the end for good."""

    def work(cancelled: Callable[[], bool]) -> Generator[Piece, None, None]:
        pieces, answer = begin(cancelled)
        told[:] = [answer]
        try:
            yield from pieces
        finally:
            final = answer()
            told[:] = [lambda: final]

    return work


def _finish(stream: Stream) -> Answer:
    with stream:
        deque(stream, maxlen=0)
    return stream.answer


def _messages(name: str, messages: Any) -> list[Message]:
    """Check that there is a conversation; what it holds is read when it is rendered.

    Raises:
        TypeError: it is no list of messages.
        UsageError: it is empty.
    """
    expect(Sequence[object], **{name: messages})
    if not messages:
        raise UsageError(f"{name}: there is no message")
    return list(messages)
