"""From a prompt to text: the model, its tokenizer and its defaults put together, and one run."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import mlx.core as mx

from apertus_mlx.backend.choose import Compute, Precision, load_for
from apertus_mlx.backend.hardware import peak_bytes
from apertus_mlx.checkpoint.config import ModelConfig
from apertus_mlx.checkpoint.generation_config import GenerationConfig, read_generation_config
from apertus_mlx.checkpoint.inventory import Inventory, take_inventory
from apertus_mlx.errors import UsageError
from apertus_mlx.generation.cached_prefix import CachedPrefix, Run
from apertus_mlx.generation.decode import DEFAULT_PREFILL_STEP, draw_tokens
from apertus_mlx.generation.sampling import Sampler, SamplingParams
from apertus_mlx.model.language_model import LanguageModel
from apertus_mlx.text.stream import TextStream
from apertus_mlx.text.template import ChatTemplate
from apertus_mlx.text.tokenizer import Role, Tokenizer

FinishReason = Literal["stop", "length", "cancelled"]
DEFAULT_MAX_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class Speaker:
    """A model that is ready to speak: weights, tokenizer, chat template and defaults."""

    directory: Path
    config: ModelConfig
    generation_config: GenerationConfig
    model: LanguageModel
    tokenizer: Tokenizer
    template: ChatTemplate | None

    @property
    def context_length(self) -> int:
        """Most tokens that prompt and answer may have together."""
        return self.config.max_position_embeddings

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end an answer; the end of the assistant's turn always does."""
        stated = self.generation_config.eos_token_ids or self.config.eos_token_ids
        return frozenset({*stated, self.tokenizer.control.end(Role.ASSISTANT)})


def load_speaker(
    directory: Path,
    dtype: str | None = None,
    *,
    compute: Compute = "auto",
    precision: Precision = "auto",
    on_inventory: Callable[[Inventory], None] | None = None,
    before_weights: Callable[[Inventory, Tokenizer, ChatTemplate | None], None] | None = None,
    on_bytes: Callable[[int, int], None] | None = None,
) -> Speaker:
    """Load everything that generation needs from the model folder `directory`.

    The small files are checked before any weight is read. For `compute` and `precision` see
    `load_for`. `on_inventory` is told what was found,
    `before_weights` may still refuse (what it raises ends the loading), `on_bytes` is told how many
    bytes of weights are loaded and how many there are.

    Raises:
        NotFoundError, RejectedError: see `load_for`, `Tokenizer.load` and `ChatTemplate.load`.
    """
    inventory = take_inventory(directory)
    if on_inventory is not None:
        on_inventory(inventory)
    config = inventory.config
    generation_config = read_generation_config(directory, config.vocab_size)
    tokenizer = Tokenizer.load(
        directory, vocab_size=config.vocab_size, bos_token_id=config.bos_token_id
    )
    template = ChatTemplate.load(directory, tokenizer)
    if before_weights is not None:
        before_weights(inventory, tokenizer, template)
    model = load_for(inventory, compute, dtype, precision, on_bytes)
    return Speaker(directory, config, generation_config, model, tokenizer, template)


def require_room(prompt_tokens: int, context_length: int) -> int:
    """How many tokens an answer may have after a prompt.

    Raises:
        UsageError: none.
    """
    room = context_length - prompt_tokens
    if room < 1:
        raise UsageError(
            f"the prompt has {prompt_tokens} tokens, but the model's context is "
            f"{context_length}, answer included; shorten it by {1 - room} or more"
        )
    return room


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that has become certain, of the answer or of the deliberation before it."""

    text: str
    is_thought: bool = False


@dataclass(frozen=True, slots=True)
class Result:
    """What one run produced and what it took.

    `token_ids` are all that were generated, a stop id included; `text` leaves out control tokens,
    deliberation and whatever follows a stop string. Rates are 0 where there was nothing to time.
    """

    text: str
    thoughts: str
    token_ids: list[int]
    prompt_token_ids: list[int]
    finish_reason: FinishReason
    reused_prompt_tokens: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    time_to_first_token_s: float
    peak_memory_bytes: int
    seed: int


@dataclass
class Generation:
    """One run over `prompt`; iterate over it, once, for pieces of text, then read `result`.

    Tokens that `prefix` holds already are not computed again; afterwards it holds as much of prompt
    and answer as has been computed. Closing the iterator, or an interrupt, ends the run; `result`
    then holds what there was.

    Attributes:
        on_prefill: is told how many tokens of the prompt are done, those reused included.
        on_prefix: is called once, when `prefix` holds all of the prompt but its last token.
        reused: tokens of the prompt that were not computed; known once the run has begun.

    Raises:
        UsageError: prompt and at least one new token do not fit the model's context.
    """

    speaker: Speaker
    prompt: Sequence[int]
    params: SamplingParams
    max_tokens: int = DEFAULT_MAX_TOKENS
    stop_strings: Sequence[str] = ()
    prefill_step: int = DEFAULT_PREFILL_STEP
    prefix: CachedPrefix | None = None
    on_prefill: Callable[[int], None] | None = None
    on_prefix: Callable[[CachedPrefix], None] | None = None
    reused: int = field(default=0, init=False)
    token_ids: list[int] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        if not self.prompt:
            raise UsageError("the prompt is empty")
        room = require_room(len(self.prompt), self.speaker.context_length)
        if self.max_tokens < 1:
            raise UsageError(f"--max-tokens {self.max_tokens}: expected 1 or more")
        self.max_tokens = min(self.max_tokens, room)
        self._begun = False
        self._answer: list[str] = []
        self._thoughts: list[str] = []
        self._finish: FinishReason = "cancelled"
        self._started = self._first = self._last = 0.0

    def __iter__(self) -> Generator[Piece, None, None]:
        if self._begun:
            raise RuntimeError("a Generation runs once; make another one for another answer")
        self._begun = True
        return self._pieces()

    def _pieces(self) -> Generator[Piece, None, None]:
        self._started = time.perf_counter()
        prefix = CachedPrefix(self.speaker.model) if self.prefix is None else self.prefix
        run = prefix.begin(self.prompt)
        self.reused = run.reused
        try:
            yield from self._answered(run, self._read(run, prefix))
        except Exception:
            run.fail()
            raise

    def _read(self, run: Run, prefix: CachedPrefix) -> mx.array:
        """Compute the prompt; returns the logits after it."""

        def on_chunk(done: int) -> None:
            if self.on_prefill is not None:
                self.on_prefill(before + done)

        before = run.reused
        if self.on_prefix is not None:
            missing = len(self.prompt) - 1 - run.reused
            if missing:
                run.read(missing, self.prefill_step, on_chunk)
                before += missing
            self.on_prefix(prefix)
        return run.read(None, self.prefill_step, on_chunk)

    def _answered(self, run: Run, logits: mx.array) -> Iterator[Piece]:
        stop_ids = self.speaker.stop_ids
        sampler = Sampler(self.params, self.prompt, self.speaker.config.output_vocab_size)
        text = _Segments(self.speaker.tokenizer, self.stop_strings)
        for token in draw_tokens(run.step, logits, sampler, self.max_tokens):
            self._last = time.perf_counter()
            self._first = self._first or self._last
            self.token_ids.append(token)
            if token in stop_ids:
                self._finish = "stop"
                break
            yield from self._kept(text.push(token))
            if text.stopped:
                self._finish = "stop"
                break
        else:
            self._finish = "length"
        yield from self._kept(text.finish())

    def _kept(self, piece: Piece) -> Iterator[Piece]:
        if piece.text:
            (self._thoughts if piece.is_thought else self._answer).append(piece.text)
            yield piece

    @property
    def result(self) -> Result:
        """What has been produced so far."""
        prefill_s, decode_s = self._first - self._started, self._last - self._first
        return Result(
            text="".join(self._answer),
            thoughts="".join(self._thoughts),
            token_ids=list(self.token_ids),
            prompt_token_ids=list(self.prompt),
            finish_reason=self._finish,
            reused_prompt_tokens=self.reused,
            prefill_tokens_per_s=_rate(len(self.prompt) - self.reused, prefill_s),
            decode_tokens_per_s=_rate(len(self.token_ids) - 1, decode_s),
            time_to_first_token_s=max(prefill_s, 0.0),
            peak_memory_bytes=peak_bytes(self.speaker.model.on_gpu),
            seed=self.params.seed,
        )


class _Segments:
    """Splits a run into deliberation (between the inner control tokens) and answer."""

    def __init__(self, tokenizer: Tokenizer, stop_strings: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stop_strings = stop_strings
        self._thinking = False
        self._stream = TextStream(tokenizer, stop_strings)

    @property
    def stopped(self) -> bool:
        return self._stream.stopped

    def push(self, token: int) -> Piece:
        control = self._tokenizer.control
        if token in (control.start(Role.INNER), control.end(Role.INNER)):
            piece = self.finish()
            self._thinking = token == control.start(Role.INNER)
            # Stop strings are for the answer; a thought may well mention one.
            self._stream = TextStream(self._tokenizer, () if self._thinking else self._stop_strings)
            return piece
        return Piece(self._stream.push(token), self._thinking)

    def finish(self) -> Piece:
        return Piece(self._stream.finish(), self._thinking)


def _rate(count: int, seconds: float) -> float:
    return count / seconds if count > 0 and seconds > 0 else 0.0
