"""One request's work: what it asks the engine for, its answers, and what it tells."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import mlx.core as mx

from apertus_mlx.cache import CacheConfig
from apertus_mlx.generation.answer import Answer, PendingAnswer
from apertus_mlx.generation.batch import Row
from apertus_mlx.generation.model_folder import LoadedModel
from apertus_mlx.generation.options import SamplingOptions
from apertus_mlx.generation.tool_grammar import ToolGrammar
from apertus_mlx.server.errors import ApiError
from apertus_mlx.server.token_watch import PromptWatch, TokenLogprob, TokenWatch
from apertus_mlx.text.pieces import Piece


@dataclass(frozen=True, slots=True)
class Task:
    """What is to be computed.

    Attributes:
        prompt: token ids.
        options: how answers are drawn; `max_tokens` fits the context.
        choices: how many answers.
        tools: which calls there may be.
        tool_names: see `Generation`.
        think: whether a deliberation may come first.
        top_logprobs: how many likeliest tokens to tell of with each; None: no probabilities.
        prompt_logprobs: the same for the prompt's tokens.
        streams: whether pieces are told as they come, or only whole answers.
        cache_key: the slot in which what was computed stays; None: in none.
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
    cache_key: str | None = None

    @property
    def positions(self) -> int:
        """The most positions that the cache of an answer holds."""
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
        begun: how many of its answers have begun.
        left: how many have not ended.
        cached: tokens of the prompt that had been computed before.
        queued_s, begun_s, first_s: `time.monotonic` of arrival, admission and the first token; 0
            before.
        generated: tokens so far, of all answers.
        finish: how the latest answer ended.
    """

    task: Task
    outbox: Outbox
    begun: int = 0
    left: int = field(init=False)
    cached: int = 0
    queued_s: float = field(default_factory=time.monotonic)
    begun_s: float = 0.0
    first_s: float = 0.0
    generated: int = 0
    finish: str = "cancelled"
    _cancelled: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.left = self.task.choices

    def cancel(self) -> None:
        """Have it end before its next step; by any thread, any number of times."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        """Whether it is to end."""
        return self._cancelled.is_set()

    @property
    def has_begun(self) -> bool:
        """Whether all its answers have begun."""
        return self.begun == self.task.choices

    def tell(self, event: Event) -> None:
        """Put an event into the outbox; where nobody reads, the job ends."""
        if not self.outbox.put(event):
            self.cancel()

    def fail(self, error: ApiError) -> None:
        """Tell an error, which is the job's end."""
        self.finish = "error"
        self.tell(Failed(error))
        self.cancel()

    def close(self, answers: int) -> bool:
        """Count so many answers as ended; returns whether that were the last ones."""
        self.left -= answers
        return answers > 0 and self.left == 0


class Choice:
    """One of a job's answers.

    Attributes:
        row: what draws its tokens, for a batch.
    """

    def __init__(self, job: Job, loaded: LoadedModel, form: CacheConfig) -> None:
        """Begin the next answer of `job`, with caches of `form`.

        Raises:
            UsageError: a grammar is too complex.
        """
        self.job, self.number = job, job.begun
        task, options = job.task, job.task.options
        if options.seed is not None:
            options = replace(options, seed=options.seed + self.number)
        self._pending = PendingAnswer(
            loaded,
            task.prompt,
            options,
            tool_names=task.tool_names,
            tools=task.tools,
            think=task.think,
        )
        self._pending.start()
        tokenizer = loaded.folder.tokenizer
        self._watch = TokenWatch(tokenizer, task.prompt, task.top_logprobs)
        self._logprobs: list[TokenLogprob] = []
        self._prompt_watch = None
        if task.prompt_logprobs is not None and self.number == 0:
            self._prompt_watch = PromptWatch(loaded, task.prompt, task.prompt_logprobs)
        job.begun += 1
        job.begun_s = job.begun_s or time.monotonic()
        self.row = Row(
            task.prompt,
            self._pending.sampler(),
            self._pending.max_tokens,
            form=form,
            rules=self._pending.rules,
            # The others of the job begin there.
            boundaries=[len(task.prompt) - 1] if task.choices > 1 else None,
            on_hidden=self._prompt_watch,
            name=task.cache_key,
        )

    def take(self, token: int, logits: mx.array) -> Answer | None:
        """Go on with a token and the logits `[vocabulary]` behind it; returns the whole answer."""
        job, pending = self.job, self._pending
        job.generated += 1
        if not job.first_s:
            job.first_s, job.cached = time.monotonic(), self.row.reused
        self._watch(token, logits)
        for piece in pending.push(token):
            self._show(piece)
        # The row may be some tokens ahead.
        if not pending.ended and len(pending.token_ids) < pending.max_tokens:
            return None
        for piece in pending.finish(exhausted=True):
            self._show(piece)
        if self._prompt_watch is not None:
            job.tell(PromptRead(self._prompt_watch.found))
        pending.reused = self.row.reused
        pending.speculation = self.row.speculation
        answer = pending.answer
        job.finish = answer.finish_reason
        ended = Ended(self.number, answer, job.cached, self._watch.reasoning, self._logprobs)
        job.tell(ended)
        return answer

    def _show(self, piece: Piece) -> None:
        if not piece.text and piece.call is None:
            return
        found = self._watch.take(piece.text) if piece.kind == "text" else []
        if self.job.task.streams:
            self.job.tell(Told(self.number, piece, found))
        else:
            self._logprobs += found
