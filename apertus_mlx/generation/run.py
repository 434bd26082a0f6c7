"""From a prompt to text: one run."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from dataclasses import dataclass, field

import mlx.core as mx

from apertus_mlx.generation.agreement import Agreement
from apertus_mlx.generation.answer import Answer, FinishReason, PendingAnswer
from apertus_mlx.generation.cached_prefix import CachedPrefix, Run
from apertus_mlx.generation.decode import DEFAULT_PREFILL_STEP, draw_tokens
from apertus_mlx.generation.model_folder import LoadedModel
from apertus_mlx.generation.options import DEFAULT_SAMPLING, SamplingOptions
from apertus_mlx.generation.speculate import Speculator
from apertus_mlx.generation.tool_grammar import ToolGrammar
from apertus_mlx.text.answer_parser import new_call_id
from apertus_mlx.text.pieces import CallPiece, Piece, ToolCall

__all__ = ["Answer", "CallPiece", "FinishReason", "Generation", "Piece", "ToolCall"]


class _Cancelled(BaseException):
    """Ends the reading of a prompt as an interrupt would."""


@dataclass
class Generation:
    """One run over `prompt`; iterate over it, once, for pieces of text, then read `answer`.

    Tokens that `prefix` holds already are not computed again; afterwards it holds as much of prompt
    and answer as has been computed. Closing the iterator, `cancelled` or an interrupt ends the run;
    `answer` then holds what there was.

    Attributes:
        on_prefill: is told how many tokens of the prompt are done, those reused included.
        on_prefix: is called once, when `prefix` holds all of the prompt but its last token.
        cancelled: is asked after each token, and chunk of the prompt, whether to end here.
        tool_names: of the tools that the prompt declares. With them, an answer that is nothing but
            a list of calls of these tools is one, though no control token says so; None where
            there are no tools or the answer's form is prescribed.
        tools: which tool calls there may be, and whether there must be one; None prescribes
            nothing.
        think: whether a deliberation may come before an answer whose form is prescribed.
        new_call_id: makes the id of a tool call.

    Raises:
        UsageError: prompt and at least one new token do not fit the model's context.
    """

    loaded: LoadedModel
    prompt: Sequence[int]
    options: SamplingOptions = DEFAULT_SAMPLING
    prefill_step: int = DEFAULT_PREFILL_STEP
    prefix: CachedPrefix | None = None
    on_prefill: Callable[[int], None] | None = None
    on_prefix: Callable[[CachedPrefix], None] | None = None
    cancelled: Callable[[], bool] | None = None
    tool_names: Collection[str] | None = None
    tools: ToolGrammar | None = None
    think: bool = False
    new_call_id: Callable[[], str] = new_call_id
    _begun: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self._agreement: Agreement | None = None
        if self.loaded.ranks is not None:
            self.prompt = self.loaded.ranks.shared(self.prompt)
            vocabulary = self.loaded.folder.config.vocab_size
            self._agreement = Agreement(self.loaded.ranks, vocabulary, self.cancelled)
            self.cancelled = self._agreement.stopped
        self._pending = PendingAnswer(
            self.loaded,
            self.prompt,
            self.options,
            tool_names=self.tool_names,
            tools=self.tools,
            think=self.think,
            new_call_id=self.new_call_id,
        )

    def __iter__(self) -> Generator[Piece, None, None]:
        if self._begun:
            raise RuntimeError("a Generation runs once; make another one for another answer")
        self._begun = True
        return self._pieces()

    @property
    def reused(self) -> int:
        """Tokens of the prompt that were not computed; known once the run has begun."""
        return self._pending.reused

    @property
    def token_ids(self) -> list[int]:
        """All tokens drawn so far."""
        return self._pending.token_ids

    @property
    def answer(self) -> Answer:
        """What has been produced so far."""
        return self._pending.answer

    def _pieces(self) -> Generator[Piece, None, None]:
        self._pending.start()
        prefix = CachedPrefix(self.loaded.model) if self.prefix is None else self.prefix
        if self.loaded.drafting is not None:
            prefix.allow_cut(self.loaded.drafting.pace.most)
        run = prefix.begin(self.prompt)
        self._pending.reused = run.reused
        try:
            yield from self._answered(run, self._read(run, prefix))
        except _Cancelled:
            return
        except Exception:
            run.fail()
            raise

    def _read(self, run: Run, prefix: CachedPrefix) -> mx.array:
        """Compute the prompt; returns the logits after it."""

        def on_chunk(done: int) -> None:
            if self.on_prefill is not None:
                self.on_prefill(before + done)
            if self.cancelled is not None and self.cancelled():
                raise _Cancelled

        before = run.reused
        if self.on_prefix is not None:
            missing = len(self.prompt) - 1 - run.reused
            if missing:
                run.read(missing, self.prefill_step, on_chunk)
                before += missing
            self.on_prefix(prefix)
        return run.read(None, self.prefill_step, on_chunk)

    def _answered(self, run: Run, logits: mx.array) -> Iterator[Piece]:
        pending, exhausted = self._pending, False
        tokens = self._drawn(run, logits)
        for token in tokens:
            yield from pending.push(token)
            if pending.ended or (self.cancelled is not None and self.cancelled()):
                break
        else:
            exhausted = True
        tokens.close()
        yield from pending.finish(exhausted)

    def _drawn(self, run: Run, logits: mx.array) -> Generator[int, None, None]:
        """The answer's token ids, with the draft if there is one."""
        pending, drafting = self._pending, self.loaded.drafting
        sampler, limit, rules = pending.sampler(), pending.max_tokens, pending.rules
        if self._agreement is not None:
            sampler.agree = self._agreement.token
        if drafting is None:
            yield from draw_tokens(run.step, logits, sampler, limit, rules)
            return
        stop_ids = self.loaded.folder.stop_ids
        speculator = Speculator(
            run, drafting.draft, drafting.pace, self.prompt, sampler, rules, stop_ids
        )
        pending.speculation = speculator.found
        yield from speculator.tokens(logits, limit)
