"""From a prompt to text: one run."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import mlx.core as mx

from apertus_mlx.backend.hardware import peak_bytes
from apertus_mlx.errors import UsageError
from apertus_mlx.generation.cached_prefix import CachedPrefix, Run
from apertus_mlx.generation.decode import DEFAULT_PREFILL_STEP, draw_tokens
from apertus_mlx.generation.model_folder import LoadedModel
from apertus_mlx.generation.options import DEFAULT_SAMPLING, SamplingOptions
from apertus_mlx.generation.sampling import Sampler, resolve_params
from apertus_mlx.generation.structured import answer_rules
from apertus_mlx.generation.thought_budget import ThoughtBudget
from apertus_mlx.generation.tool_grammar import ToolGrammar
from apertus_mlx.model.language_model import NextTokenLogits
from apertus_mlx.text.answer_parser import AnswerParser, new_call_id
from apertus_mlx.text.filtered_pieces import PieceFilter
from apertus_mlx.text.messages import Message
from apertus_mlx.text.pieces import CallPiece, Piece, ToolCall
from apertus_mlx.text.roles import Role

__all__ = ["Answer", "CallPiece", "FinishReason", "Generation", "Piece", "ToolCall"]

_log = logging.getLogger(__name__)

FinishReason = Literal["stop", "length", "tool_calls", "cancelled"]


@dataclass(frozen=True, slots=True)
class Answer:
    """What one run produced and what it took.

    Attributes:
        text: the answer alone, without control tokens, deliberation or what follows a stop string.
        thought: the deliberation before it; empty if there was none.
        token_ids: all that were generated, a stop id included; no output filter changes them.
        prompt_token_ids: the prompt's.
        finish_reason: `stop`: the model or a stop string ended it; `tool_calls`: so, and the model
            asks for tools; `length`: it reached `max_tokens` or the model's context, or a stop
            string ended it before what a schema or a tool choice prescribes was complete;
            `cancelled`: someone ended it.
        reused_prompt_tokens: tokens of the prompt that had been computed before.
        prefill_tokens_per_s: prompt tokens computed in a second; 0 if there was nothing to time.
        decode_tokens_per_s: tokens generated in a second after the first one; 0 likewise.
        time_to_first_token_s: seconds from the start to the first token.
        peak_memory_bytes: the most memory that the process has held.
        seed: with which the same prompt gives the same answer again.
        tool_calls: the tools that the model asks for, in order; one that was cut by `max_tokens`
            is the last.
        malformed_tool_calls: how many calls were no valid JSON; what the model wrote is text.
    """

    text: str
    thought: str
    token_ids: list[int]
    prompt_token_ids: list[int]
    finish_reason: FinishReason
    reused_prompt_tokens: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    time_to_first_token_s: float
    peak_memory_bytes: int
    seed: int
    tool_calls: list[ToolCall] = field(default_factory=list)
    malformed_tool_calls: int = 0

    def as_message(self) -> Message:
        """The answer as an assistant's message of OpenAI's API, to go on from.

        Calls are in it if the answer ends with them, and with them the thoughts, which go on when
        the results are there. Other thoughts are left out.
        """
        calls = self.tool_calls if self.finish_reason == "tool_calls" else []
        message = Message(role="assistant", content=self.text or (None if calls else ""))
        if calls and self.thought:
            message["reasoning_content"] = self.thought
        if calls:
            message["tool_calls"] = [each.as_message() for each in calls]
        return message

    @property
    def prompt_tokens(self) -> int:
        """How many tokens the prompt has."""
        return len(self.prompt_token_ids)

    @property
    def generated_tokens(self) -> int:
        """How many tokens were generated, a stop id included."""
        return len(self.token_ids)


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
        on_token: is told each token, and the logits `[vocabulary]` that it was drawn from as the
            model computed them, before penalties and what else changes them.
        stepwise: whether a piece without text is yielded after each token, so that whoever reads
            gets to do something else.
        reused: tokens of the prompt that were not computed; known once the run has begun.

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
    on_token: Callable[[int, mx.array], None] | None = None
    stepwise: bool = False
    reused: int = field(default=0, init=False)
    token_ids: list[int] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        if not self.prompt:
            raise UsageError("the prompt is empty")
        room = self.loaded.folder.require_room(len(self.prompt))
        self._max_tokens = min(self.options.max_tokens, room)
        self._params = resolve_params(self.loaded.folder.generation_config, self.options)
        self._params.require_ids(self._vocab_size)
        self._rules = answer_rules(
            self.loaded.folder.tokenizer,
            self._vocab_size,
            self.loaded.folder.stop_ids,
            self.prompt,
            self.options.schema_text,
            self.tools,
            self.think,
        )
        self._begun = False
        self._text: list[str] = []
        self._thought: list[str] = []
        self._calls: dict[int, list[CallPiece]] = {}
        self._parser = self._new_parser()
        chosen = self.loaded.output_filter
        self._filter = None if chosen is None else PieceFilter(chosen)
        self._finish: FinishReason = "cancelled"
        self._started = self._first = self._last = 0.0

    def __iter__(self) -> Generator[Piece, None, None]:
        if self._begun:
            raise RuntimeError("a Generation runs once; make another one for another answer")
        self._begun = True
        return self._pieces()

    def _pieces(self) -> Generator[Piece, None, None]:
        self._started = time.perf_counter()
        prefix = CachedPrefix(self.loaded.model) if self.prefix is None else self.prefix
        run = prefix.begin(self.prompt)
        self.reused = run.reused
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
        stop_ids = self.loaded.folder.stop_ids
        sampler = Sampler(self._params, self.prompt, self._vocab_size, self._thought_budget())
        parser = self._parser
        sources = deque([logits])

        def noted(token: mx.array) -> NextTokenLogits:
            found = run.step(token)
            sources.append(found.values)
            return found

        step = run.step if self.on_token is None else noted
        for token in draw_tokens(step, logits, sampler, self._max_tokens, self._rules):
            self._last = time.perf_counter()
            self._first = self._first or self._last
            self.token_ids.append(token)
            if self.on_token is not None:
                self.on_token(token, sources.popleft())
            if token in stop_ids:
                self._finish = self._end
                break
            yield from self._kept(self._filtered(parser.push(token)))
            if parser.stopped:
                self._finish = self._end
                break
            if self.cancelled is not None and self.cancelled():
                break
            if self.stepwise:
                yield Piece("")
        else:
            self._finish = "length"
        yield from self._kept(self._filtered(parser.finish(cut=self._finish != "stop")))
        if self._filter is not None:
            yield from self._kept(self._filter.finish())
        if parser.malformed:
            _log.warning("the model wrote a tool call that is no valid JSON; it is kept as text")

    @property
    def _vocab_size(self) -> int:
        """How many logits the model has."""
        return self.loaded.folder.config.output_vocab_size

    @property
    def _end(self) -> FinishReason:
        """What an end is called: one before the prescribed form is complete is a cut."""
        return "stop" if self._rules is None or self._rules.complete else "length"

    def _thought_budget(self) -> ThoughtBudget | None:
        most, roles = self.options.max_thought_tokens, self.loaded.folder.tokenizer.roles
        if most is None:
            return None
        pairs = zip(sorted(roles.thought_starts), sorted(roles.thought_ends), strict=True)
        starts = [token for token in self.prompt if token in roles.thought_starts]
        opened = starts[-1] if roles.leaves_thought_open(self.prompt) else None
        return ThoughtBudget(most, list(pairs), Role.TOOLS.start, opened)

    def _new_parser(self) -> AnswerParser:
        tokenizer = self.loaded.folder.tokenizer
        return AnswerParser(
            tokenizer,
            self.options.stop_strings,
            thinking=tokenizer.roles.leaves_thought_open(self.prompt),
            tool_names=self.tool_names if self.options.schema is None else None,
            new_id=self.new_call_id,
        )

    def _filtered(self, pieces: Iterable[Piece]) -> Iterable[Piece]:
        return pieces if self._filter is None else self._filter.push(pieces)

    def _kept(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
        for piece in pieces:
            if piece.call is None:
                (self._thought if piece.is_thought else self._text).append(piece.text)
            elif piece.call.withdrawn:
                del self._calls[piece.call.index]
            else:
                self._calls.setdefault(piece.call.index, []).append(piece.call)
            yield piece

    @property
    def _finish_reason(self) -> FinishReason:
        asks = self._finish == "stop" or (
            self._finish == "length" and self._parser.ended_with_calls
        )
        return "tool_calls" if asks and self._calls else self._finish

    @property
    def answer(self) -> Answer:
        """What has been produced so far."""
        prefill_s, decode_s = self._first - self._started, self._last - self._first
        return Answer(
            text="".join(self._text),
            thought="".join(self._thought),
            token_ids=list(self.token_ids),
            prompt_token_ids=list(self.prompt),
            finish_reason=self._finish_reason,
            reused_prompt_tokens=self.reused,
            prefill_tokens_per_s=_rate(len(self.prompt) - self.reused, prefill_s),
            decode_tokens_per_s=_rate(len(self.token_ids) - 1, decode_s),
            time_to_first_token_s=max(prefill_s, 0.0),
            peak_memory_bytes=peak_bytes(self.loaded.model.on_gpu),
            seed=self._params.seed,
            tool_calls=[_call(parts) for parts in self._calls.values()],
            malformed_tool_calls=self._parser.malformed,
        )


def _call(parts: Sequence[CallPiece]) -> ToolCall:
    """Put the pieces of one call together."""
    first = parts[0]
    return ToolCall(first.id or "", first.name or "", "".join(part.arguments for part in parts))


def _rate(count: int, seconds: float) -> float:
    return count / seconds if count > 0 and seconds > 0 else 0.0
