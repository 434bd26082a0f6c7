"""This package's side with a draft, which guesses tokens that one pass of the model checks."""

from __future__ import annotations

from collections.abc import Generator

import mlx.core as mx

from apertus_mlx.cache import Cache, CacheConfig, allow_cut, rewind
from apertus_mlx.errors import UsageError
from apertus_mlx.generation.decode import prefill
from apertus_mlx.generation.drafts import Drafting
from apertus_mlx.generation.sampling import Sampler, SamplingParams
from apertus_mlx.generation.speculate import Speculation, Speculator
from apertus_mlx.measure.bench.stopwatch import Engine
from apertus_mlx.model.language_model import LanguageModel, NextTokenLogits

# More than any context holds: what is decoded has no end.
ENDLESS = 2**31


class Drafted(Engine):
    """`Engine` of this package, with a draft.

    Attributes:
        speculation: what the draft was good for, in all that was decoded.
    """

    def __init__(
        self, model: LanguageModel, form: CacheConfig, prefill_step: int, drafting: Drafting
    ) -> None:
        self.speculation = Speculation(row_costs=drafting.pace.row_costs)
        self._model, self._form, self._prefill_step = model, form, prefill_step
        self._drafting = drafting
        # What each cache holds before the prompt of `tokens`.
        self._before: list[int] = []

    def make_cache(self) -> list[Cache]:
        """See `Engine`."""
        self._before = []
        cache = self._model.make_cache(self._form)
        if not allow_cut(cache, self._drafting.pace.most):
            raise UsageError(f"--draft: a cache in {self._form} cannot be cut back")
        return cache

    def read(self, prompt: list[int], cache: list[Cache]) -> None:
        """See `Engine`."""
        self._before = prompt
        prefill(self._model, prompt, cache, self._prefill_step)

    def tokens(self, prompt: list[int], cache: list[Cache]) -> Generator[int, None, None]:
        """See `Engine`."""
        ids = [*self._before, *prompt]
        width = self._model.config.output_vocab_size
        sampler = Sampler(SamplingParams(temperature=0, seed=0), ids, width)
        logits = prefill(self._model, prompt, cache, self._prefill_step)
        pace = self._drafting.pace
        checked = Speculator(_Caches(self._model, cache), self._drafting.draft, pace, ids, sampler)
        try:
            yield from checked.tokens(logits, ENDLESS)
        finally:
            self.speculation.drafted += checked.found.drafted
            self.speculation.accepted += checked.found.accepted
            self.speculation.passes += checked.found.passes
            self.speculation.tokens += checked.found.tokens
            self.speculation.off = checked.found.off

    def rewind(self, cache: list[Cache], positions: int) -> bool:
        """See `Engine`."""
        return rewind(cache, positions)


class _Caches:
    """`Target` on caches that hold what was read, and nothing else."""

    def __init__(self, model: LanguageModel, cache: list[Cache]) -> None:
        self._model, self._cache = model, cache

    def step(self, token: mx.array) -> NextTokenLogits:
        return self._model.next_token_logits(token.reshape(1, 1), self._cache)

    def check(self, tokens: mx.array) -> mx.array:
        return self._model(tokens[None], self._cache)[0]

    def keep(self, length: int) -> None:
        if not rewind(self._cache, max(self._cache[0].offset - length, 0)):
            raise RuntimeError("a cache could not forget wrong guesses")
