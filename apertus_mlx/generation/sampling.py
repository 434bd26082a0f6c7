"""From logits to the next token: penalties, temperature and the usual filters, then one draw.

The order is that of transformers, whose `generation_config.json` names the parameters: biases,
repetition penalty, temperature, top-k, top-p, min-p. OpenAI's presence and frequency penalties
follow the repetition penalty, as in mlx-lm; then all tokens but those allowed fall away.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from apertus_mlx.backend.hardware import has_gpu
from apertus_mlx.checkpoint.generation_config import GenerationConfig
from apertus_mlx.errors import UsageError
from apertus_mlx.generation.options import SamplingOptions
from apertus_mlx.generation.thought_budget import ThoughtBudget, Thoughts
from apertus_mlx.model.language_model import NextTokenLogits
from apertus_mlx.system.arguments import check_fields

DEFAULT_TEMPERATURE, DEFAULT_TOP_P = 0.8, 0.9
# Below it even neighbours in float32 differ by a factor of 7 or more in probability (logits of 20):
# the likeliest token is all there is.
COLDEST = 1e-6


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to draw a token; a temperature below `COLDEST` takes the most likely one.

    Raises:
        UsageError: a value outside its range.
    """

    temperature: float = DEFAULT_TEMPERATURE
    top_p: float = DEFAULT_TOP_P
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = field(default_factory=lambda: secrets.randbelow(2**32))

    def __post_init__(self) -> None:
        check_fields(self, SamplingOptions)

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature < COLDEST or self.top_k == 1

    @property
    def penalizes_answer(self) -> bool:
        """Whether it matters how often a token has been generated."""
        return bool(self.presence_penalty or self.frequency_penalty)

    def require_ids(self, vocab_size: int) -> None:
        """Require that the biased tokens are among those that a model has logits of.

        Raises:
            UsageError: one is not.
        """
        for token in self.logit_bias:
            if token >= vocab_size:
                raise UsageError(
                    f"--logit-bias {token}: the model's tokens are 0 to {vocab_size - 1}"
                )


def resolve_params(config: GenerationConfig, options: SamplingOptions) -> SamplingParams:
    """What the user asked for, else what the model's makers recommend, else our defaults.

    Without any recommendation that is temperature 0.8 and top-p 0.9 (the Apertus model cards).
    """

    def choose(name: str, default: float) -> Any:
        asked = getattr(options, name)
        return (getattr(config, name) or default) if asked is None else asked

    temperature = options.temperature
    if temperature is None:
        temperature = 0.0 if config.do_sample is False else config.temperature
    recommended = config.temperature is not None or config.top_p is not None
    return SamplingParams(
        temperature=DEFAULT_TEMPERATURE if temperature is None else temperature,
        top_p=choose("top_p", 1.0 if recommended else DEFAULT_TOP_P),
        top_k=choose("top_k", 0),
        min_p=choose("min_p", 0.0),
        repetition_penalty=choose("repetition_penalty", 1.0),
        presence_penalty=options.presence_penalty or 0.0,
        frequency_penalty=options.frequency_penalty or 0.0,
        logit_bias=options.biases,
        seed=secrets.randbelow(2**32) if options.seed is None else options.seed,
    )


class SamplerState(NamedTuple):
    """What earlier draws leave behind; each array is a value of its own."""

    key: mx.array
    seen: mx.array | None  # which tokens prompt and answer have, `[vocabulary]`
    counts: mx.array | None  # how often the answer has each, `[vocabulary]`
    thoughts: Thoughts | None


class Sampler:
    """Draws tokens for one sequence; everything stays lazy, so that decoding can run ahead.

    Attributes:
        agree: the token that is taken for the one drawn, where several draw together.
    """

    agree: Callable[[mx.array], mx.array] | None = None

    def __init__(
        self,
        params: SamplingParams,
        prompt: Sequence[int],
        vocab_size: int,
        budget: ThoughtBudget | None = None,
    ) -> None:
        """Begin an answer to `prompt`; `budget` bounds its deliberations.

        Raises:
            UsageError: see `SamplingParams.require_ids`.
        """
        params.require_ids(vocab_size)
        self._params = params
        self._budget = budget
        self._key = mx.random.key(params.seed)
        self._seen: mx.array | None = None
        self._counts: mx.array | None = None
        if params.repetition_penalty != 1.0:
            self._seen = mx.zeros((vocab_size,), mx.bool_)
            inside = [token for token in prompt if token < vocab_size]
            if inside:
                self._seen[mx.array(inside)] = True
        if params.penalizes_answer:
            self._counts = mx.zeros((vocab_size,), mx.float32)

    @property
    def state(self) -> SamplerState:
        """What the next draw depends on beside logits; set it to draw once more from there."""
        thoughts = None if self._budget is None else self._budget.state
        return SamplerState(self._key, self._seen, self._counts, thoughts)

    @state.setter
    def state(self, state: SamplerState) -> None:
        self._key, self._seen, self._counts, thoughts = state
        if self._budget is not None and thoughts is not None:
            self._budget.state = thoughts

    def __call__(self, given: NextTokenLogits, allowed: mx.array | None = None) -> mx.array:
        """Draw a token id (shape `[]`) among those `allowed` (`[vocabulary]`; None: all)."""
        given = self._adjust(given)
        if allowed is not None:
            given = NextTokenLogits(mx.where(allowed, given.values, -math.inf))
        if self._params.greedy:
            token = mx.argmax(given.values) if given.best is None else given.best
        else:
            self._key, key = mx.random.split(self._key)
            token = mx.random.categorical(filter_logits(given, self._params), key=key)
        if self._budget is not None:
            token = self._budget(token)
        if self.agree is not None:
            token = self.agree(token)
        if self._seen is not None:
            self._seen = mx.put_along_axis(self._seen, token.reshape(1), mx.array(True), axis=0)
        if self._counts is not None:
            self._counts = self._counts.at[token].add(1)
        return token

    def _adjust(self, given: NextTokenLogits) -> NextTokenLogits:
        """Apply biases and penalties, in float32.

        What the model found out about its own logits does not hold for others.
        """
        params = self._params
        if params.logit_bias:
            values = given.values.astype(mx.float32)
            bias = mx.array(list(params.logit_bias.values()), mx.float32)
            given = NextTokenLogits(values.at[mx.array(list(params.logit_bias))].add(bias))
        if self._seen is not None:
            given = NextTokenLogits(penalize(given.values, self._seen, params.repetition_penalty))
        if self._counts is not None:
            often = self._counts * params.frequency_penalty
            present = (self._counts > 0) * params.presence_penalty
            given = NextTokenLogits(given.values.astype(mx.float32) - often - present)
        return given


def penalize(logits: mx.array, seen: mx.array, penalty: float) -> mx.array:
    """Divide positive and multiply negative logits of `seen` tokens (CTRL, arXiv 1909.05858).

    In float32, whatever the logits are in: float16 ends at 65,504.
    """
    logits = logits.astype(mx.float32)
    return mx.where(seen, mx.where(logits > 0, logits / penalty, logits * penalty), logits)


def filter_logits(given: NextTokenLogits, params: SamplingParams) -> mx.array:
    """Scale by temperature and set all but the likely tokens to minus infinity, in float32.

    The largest comes out as 0. It is taken away before the division: what lies near it keeps its
    digits, and nothing overflows but to a probability of 0.
    """
    logits = given.values.astype(mx.float32)
    size = logits.shape[-1]
    largest = mx.max(logits)
    if 0 < params.top_k < size:
        threshold = kth_largest(given, params.top_k).astype(mx.float32)
        logits = mx.where(logits < threshold, -math.inf, logits)
    logits = (logits - largest) / params.temperature
    if params.top_p < 1:
        kept = nucleus(mx.softmax(logits), params.top_p)
        logits = mx.where(kept, logits, -math.inf)
    if params.min_p > 0:
        logits = mx.where(logits < math.log(params.min_p), -math.inf, logits)
    return logits


def kth_largest(given: NextTokenLogits, k: int) -> mx.array:
    """The `k`-th largest logit, shape `[]`.

    It lies in one of the `k` runs with the largest peaks: another run with a logit above it would
    have a peak above it, and fewer than `k` logits are.
    """
    candidates = given.values
    if given.peaks is not None and k < given.peaks.size:
        runs = mx.argpartition(-given.peaks, k - 1)[:k]
        candidates = candidates.reshape(given.peaks.size, -1)[runs].reshape(-1)
    return mx.min(mx.topk(candidates, k))


def nucleus(probabilities: mx.array, top_p: float) -> mx.array:
    """Which tokens are the likeliest that reach `top_p` together, `[vocabulary]`.

    A token stays if those before it have not yet reached top_p; the first always does.
    """
    size = probabilities.shape[-1]
    if not has_gpu():
        # Sorting is slow in MLX here. Tokens below this bound all fit into the tail together.
        values = np.asarray(probabilities)
        candidates = np.flatnonzero(values >= (1 - top_p) / size)
        order = candidates[np.argsort(-values[candidates], kind="stable")]
        ranked = values[order].astype(np.float64)
        chosen = np.zeros(size, np.bool_)
        chosen[order[np.cumsum(ranked) - ranked < top_p]] = True
        return mx.array(chosen)
    by_rank = mx.argsort(-probabilities)
    likeliest = probabilities[by_rank]
    kept_ranks = mx.cumsum(likeliest) - likeliest < top_p
    return mx.put_along_axis(mx.zeros((size,), mx.bool_), by_rank, kept_ranks, axis=-1)
