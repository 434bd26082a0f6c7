"""An answer: what it is at the end, and how it grows from tokens to text, whatever draws them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from apertus_mlx.backend.hardware import peak_bytes
from apertus_mlx.errors import UsageError
from apertus_mlx.generation.model_folder import LoadedModel
from apertus_mlx.generation.options import DEFAULT_SAMPLING, SamplingOptions
from apertus_mlx.generation.sampling import Sampler, resolve_params
from apertus_mlx.generation.speculate import Speculation
from apertus_mlx.generation.structured import answer_rules
from apertus_mlx.generation.thought_budget import ThoughtBudget
from apertus_mlx.generation.tool_grammar import ToolGrammar
from apertus_mlx.text.answer_parser import AnswerParser, new_call_id
from apertus_mlx.text.filtered_pieces import PieceFilter
from apertus_mlx.text.messages import Message
from apertus_mlx.text.pieces import CallPiece, Piece, ToolCall
from apertus_mlx.text.roles import Role

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
        speculation: what a draft was good for; None without one.
        stop_string: that ended it; None: none did.
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
    speculation: Speculation | None = None
    stop_string: str | None = None

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


class PendingAnswer:
    """An answer to `prompt` on its way: how its tokens are drawn, and what they say so far.

    Attributes:
        max_tokens: most tokens that may be drawn.
        rules: which tokens may come next; None: any.
        token_ids: all so far.
        ended: whether the latest token was the last.
        reused: tokens of the prompt that were not computed; for the answer to tell.
        speculation: what a draft was good for; likewise.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        prompt: Sequence[int],
        options: SamplingOptions = DEFAULT_SAMPLING,
        *,
        tool_names: Collection[str] | None = None,
        tools: ToolGrammar | None = None,
        think: bool = False,
        new_call_id: Callable[[], str] = new_call_id,
    ) -> None:
        """Begin; for the arguments see `Generation`.

        Raises:
            UsageError: prompt and at least one new token do not fit the model's context.
        """
        if not prompt:
            raise UsageError("the prompt is empty")
        folder = loaded.folder
        self._loaded, self._prompt, self._options = loaded, prompt, options
        self._vocab_size = folder.config.output_vocab_size
        self.max_tokens = min(options.max_tokens, folder.require_room(len(prompt)))
        self._params = resolve_params(folder.generation_config, options)
        self._params.require_ids(self._vocab_size)
        self.rules = answer_rules(
            folder.tokenizer,
            self._vocab_size,
            folder.stop_ids,
            prompt,
            options.schema_text,
            tools,
            think,
        )
        self._parser = AnswerParser(
            folder.tokenizer,
            options.stop_strings,
            thinking=folder.tokenizer.roles.leaves_thought_open(prompt),
            tool_names=tool_names if options.schema is None else None,
            new_id=new_call_id,
        )
        chosen = loaded.output_filter
        self._filter = None if chosen is None else PieceFilter(chosen)
        self._text: list[str] = []
        self._thought: list[str] = []
        self._calls: dict[int, list[CallPiece]] = {}
        self._finish: FinishReason = "cancelled"
        self.token_ids: list[int] = []
        self.ended = False
        self.reused = 0
        self.speculation: Speculation | None = None
        self._started_s = self._first_s = self._last_s = 0.0

    def start(self) -> None:
        """Note that the prompt is being read from now on."""
        self._started_s = time.perf_counter()

    def sampler(self) -> Sampler:
        """What draws its tokens; to be made once."""
        return Sampler(self._params, self._prompt, self._vocab_size, self._thought_budget())

    def push(self, token: int) -> Iterator[Piece]:
        """Go on with a token that was drawn; yields what it makes certain."""
        self._last_s = time.perf_counter()
        self._first_s = self._first_s or self._last_s
        self.token_ids.append(token)
        if token in self._loaded.folder.stop_ids:
            self._end()
            return
        yield from self._kept(self._filtered(self._parser.push(token)))
        if self._parser.stopped:
            self._end()

    def finish(self, exhausted: bool = False) -> Iterator[Piece]:
        """Yield what is left at the end; `exhausted`: no more tokens may be drawn."""
        if exhausted and not self.ended:
            self._finish = "length"
        yield from self._kept(self._filtered(self._parser.finish(cut=self._finish != "stop")))
        if self._filter is not None:
            yield from self._kept(self._filter.finish())
        if self._parser.malformed:
            _log.warning("the model wrote a tool call that is no valid JSON; it is kept as text")

    @property
    def answer(self) -> Answer:
        """What there is so far."""
        prefill_s, decode_s = self._first_s - self._started_s, self._last_s - self._first_s
        return Answer(
            text="".join(self._text),
            thought="".join(self._thought),
            token_ids=list(self.token_ids),
            prompt_token_ids=list(self._prompt),
            finish_reason=self._finish_reason,
            reused_prompt_tokens=self.reused,
            prefill_tokens_per_s=_rate(len(self._prompt) - self.reused, prefill_s),
            decode_tokens_per_s=_rate(len(self.token_ids) - 1, decode_s),
            time_to_first_token_s=max(prefill_s, 0.0),
            peak_memory_bytes=peak_bytes(self._loaded.model.on_gpu),
            seed=self._params.seed,
            tool_calls=[_call(parts) for parts in self._calls.values()],
            malformed_tool_calls=self._parser.malformed,
            speculation=self.speculation,
            stop_string=self._parser.stop_string,
        )

    def _end(self) -> None:
        """The model or a stop string ends it: a cut, where the prescribed form is not complete."""
        self.ended = True
        self._finish = "stop" if self.rules is None or self.rules.complete else "length"

    def _thought_budget(self) -> ThoughtBudget | None:
        most, roles = self._options.max_thought_tokens, self._loaded.folder.tokenizer.roles
        if most is None:
            return None
        pairs = zip(sorted(roles.thought_starts), sorted(roles.thought_ends), strict=True)
        starts = [token for token in self._prompt if token in roles.thought_starts]
        opened = starts[-1] if roles.leaves_thought_open(self._prompt) else None
        return ThoughtBudget(most, list(pairs), Role.TOOLS.start, opened)

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


def _call(parts: Sequence[CallPiece]) -> ToolCall:
    """Put the pieces of one call together."""
    first = parts[0]
    return ToolCall(first.id or "", first.name or "", "".join(part.arguments for part in parts))


def _rate(count: int, seconds: float) -> float:
    return count / seconds if count > 0 and seconds > 0 else 0.0
