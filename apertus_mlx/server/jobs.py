"""One request's work: what it asks the engine for, its steps, and what it tells."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import mlx.core as mx

from apertus_mlx.generation.cached_prefix import CachedPrefix
from apertus_mlx.generation.decode import chunk_sizes
from apertus_mlx.generation.model_folder import LoadedModel
from apertus_mlx.generation.options import SamplingOptions
from apertus_mlx.generation.run import Answer, Generation
from apertus_mlx.generation.tool_grammar import ToolGrammar
from apertus_mlx.server.errors import ApiError
from apertus_mlx.server.token_watch import TokenLogprob, TokenWatch, token_logprob
from apertus_mlx.text.pieces import Piece

# Positions whose logits are computed at a time for `prompt_logprobs`.
LOGITS_STEP = 32


@dataclass(frozen=True, slots=True)
class Task:
    """What is to be computed.

    Attributes:
        prompt: token ids.
        options: how answers are drawn; `max_tokens` fits the context.
        choices: how many answers, one after the other.
        tools: which calls there may be.
        tool_names: see `Generation`.
        think: whether a deliberation may come first.
        top_logprobs: how many likeliest tokens to tell of with each; None: no probabilities.
        prompt_logprobs: the same for the prompt's tokens.
        streams: whether pieces are told as they come, or only whole answers.
    """

    prompt: Sequence[int]
    options: SamplingOptions
    choices: int = 1
    tools: ToolGrammar | None = None
    tool_names: Sequence[str] | None = None
    think: bool = False
    top_logprobs: int | None = None
    prompt_logprobs: int | None = None
    streams: bool = False

    @property
    def positions(self) -> int:
        """The most positions that its cache holds."""
        return len(self.prompt) + self.options.max_tokens


@dataclass(frozen=True, slots=True)
class Told:
    """The next piece of an answer."""

    choice: int
    piece: Piece
    logprobs: Sequence[TokenLogprob] = ()


@dataclass(frozen=True, slots=True)
class Ended:
    """A whole answer; `logprobs` are those of its text, or the rest of them in a stream."""

    choice: int
    answer: Answer
    cached_tokens: int
    reasoning_tokens: int
    logprobs: Sequence[TokenLogprob] = ()


@dataclass(frozen=True, slots=True)
class PromptRead:
    """The probabilities of the prompt's tokens but the first."""

    logprobs: Sequence[TokenLogprob]


@dataclass(frozen=True, slots=True)
class Failed:
    """The job's end by an error."""

    error: ApiError


Event = Told | Ended | PromptRead | Failed


class Outbox(Protocol):
    """Where a job tells what happens."""

    def put(self, event: Event) -> bool:
        """Take an event; returns whether anybody still reads."""
        ...


@dataclass(slots=True, eq=False)
class Job:
    """A task on its way through the engine.

    Attributes:
        reads: whether the prompt is still being read, rather than an answer written.
        cached: tokens of the prompt that had been computed before.
        begun_s, first_s: `time.monotonic` of admission and of the first token; 0 before.
        generated: tokens so far, of all choices.
    """

    task: Task
    outbox: Outbox
    prefix: CachedPrefix | None = None
    reads: bool = True
    cached: int = 0
    queued_s: float = field(default_factory=time.monotonic)
    begun_s: float = 0.0
    first_s: float = 0.0
    last_s: float = 0.0
    generated: int = 0
    finish: str = "cancelled"
    _cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        """Have it end before its next step; by any thread, any number of times."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        """Whether it is to end."""
        return self._cancelled.is_set()

    def steps(
        self, loaded: LoadedModel, prefix: CachedPrefix, prefill_step: Callable[[], int]
    ) -> Iterator[None]:
        """The work; each step is a chunk of the prompt or a token.

        `prefill_step` is asked before each chunk how long it may be.
        """
        self.prefix = prefix
        if self.task.prompt_logprobs is not None:
            yield from self._read_with_logprobs(loaded, prefill_step)
        for choice in range(self.task.choices):
            yield from self._answer(loaded, prefix, choice, prefill_step)

    def _answer(
        self,
        loaded: LoadedModel,
        prefix: CachedPrefix,
        choice: int,
        prefill_step: Callable[[], int],
    ) -> Iterator[None]:
        task, self.reads, self.finish = self.task, True, "cancelled"
        run = prefix.begin(task.prompt)
        if choice == 0:
            self.cached = run.reused
        left = len(task.prompt) - run.reused
        # All chunks but the last, which is left to the generation.
        while len(sizes := chunk_sizes(left, prefill_step())) > 1:
            run.read(sizes[0])
            left -= sizes[0]
            yield
        options = task.options
        if options.seed is not None and choice:
            options = replace(options, seed=options.seed + choice)
        tokenizer = loaded.folder.tokenizer
        watch = TokenWatch(tokenizer, task.prompt, task.top_logprobs)
        generation = Generation(
            loaded,
            task.prompt,
            options,
            prefix=prefix,
            tool_names=task.tool_names,
            tools=task.tools,
            think=task.think,
            on_token=watch,
            stepwise=True,
        )
        logprobs: list[TokenLogprob] = []
        for piece in generation:
            if self.reads:
                self.reads = False
                self.first_s = self.first_s or time.monotonic()
            if piece.text or piece.call is not None:
                shown = piece.kind == "text"
                found = watch.take(piece.text) if shown else []
                if task.streams:
                    self._tell(Told(choice, piece, found))
                else:
                    logprobs += found
            else:
                self.generated += 1
                self.last_s = time.monotonic()
                yield
        answer = generation.answer
        self.finish = answer.finish_reason
        self._tell(Ended(choice, answer, self.cached, watch.reasoning, logprobs))

    def _read_with_logprobs(
        self, loaded: LoadedModel, prefill_step: Callable[[], int]
    ) -> Iterator[None]:
        """Compute the prompt once more, with the logits of all its positions."""
        model, ids, found = loaded.model, self.task.prompt, []
        top = self.task.prompt_logprobs or 0
        cache = model.make_cache()
        start = 0
        while start < len(ids) - 1:
            chunk = ids[start : min(start + prefill_step(), len(ids) - 1)]
            hidden = model.model(mx.array([list(chunk)]), cache)
            for first in range(0, len(chunk), LOGITS_STEP):
                logits = model.logits(hidden[:, first : first + LOGITS_STEP])[0]
                for row in range(logits.shape[0]):
                    token = ids[start + first + row + 1]
                    found.append(token_logprob(loaded.folder.tokenizer, token, logits[row], top))
            mx.clear_cache()
            start += len(chunk)
            yield
        self._tell(PromptRead(found))

    def _tell(self, event: Event) -> None:
        if not self.outbox.put(event):
            self.cancel()
