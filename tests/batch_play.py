"""Random mixes of requests played on one batch, each row held against its tokens run alone.

Rows join and leave at any time, in any form of cache, with settings of their own. Every logit that
a row was drawn from is compared with that of the same tokens fed one by one to a fresh cache.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from apertus_mlx.cache import CacheConfig
from apertus_mlx.generation.batch import Batch, Row
from apertus_mlx.generation.prefix_trie import PrefixTrie
from apertus_mlx.generation.sampling import Sampler, SamplingParams
from apertus_mlx.model.apertus import Model
from apertus_mlx.model.language_model import NextTokenLogits
from tests.cache_sequences import FORMS, TOLERANCE, TOLERANCE_OF_CODES

VOCABULARY = 384
FIRST_ID = 74


class RecordingSampler(Sampler):
    """A sampler that remembers what it drew from."""

    def __init__(self, params: SamplingParams, prompt: Sequence[int], **rest: Any) -> None:
        super().__init__(params, prompt, VOCABULARY, **rest)
        self.drawn: list[tuple[mx.array, mx.array]] = []

    def __call__(self, given: NextTokenLogits, allowed: mx.array | None = None) -> mx.array:
        token = super().__call__(given, allowed)
        self.drawn.append((given.values, token))
        return token

    def logits(self, count: int) -> list[np.ndarray]:
        """Those of the first `count` tokens."""
        return [np.array(values) for values, _ in self.drawn[:count]]


def new_row(
    prompt: Sequence[int],
    form: CacheConfig = CacheConfig(),  # noqa: B008 - it cannot change
    max_tokens: int = 8,
    **params: Any,
) -> tuple[Row, RecordingSampler]:
    sampler = RecordingSampler(
        SamplingParams(**{"temperature": 0.0, "top_p": 1.0, **params}), prompt
    )
    return Row(prompt, sampler, max_tokens, form=form), sampler


def answer(row: Row) -> list[int]:
    return row.ids[row.prompt_tokens :]


def run(batch: Batch, rows: Sequence[Row] = ()) -> None:
    """Run until all rows have ended."""
    for row in rows:
        batch.join(row)
    while len(batch):
        for event in batch.turn():
            assert event.error is None, event.error


def alone(model: Model, ids: Sequence[int], prompt: int, form: CacheConfig) -> list[np.ndarray]:
    """Logits after `ids[:n]` for each n from `prompt` to the end, fed alone, one by one."""
    caches = model.make_cache(form)
    found = [np.array(model(mx.array([ids[:prompt]]), caches)[0, -1])]
    for token in ids[prompt:]:
        found.append(np.array(model(mx.array([[token]]), caches)[0, -1]))
    return found


@dataclass
class Counts:
    rows: int = 0
    left_early: int = 0
    compared: int = 0
    reused: int = 0
    beyond: int = 0
    worst: float = 0.0
    forms: set[str] = field(default_factory=set)


class Play:
    """One batch to which requests come at random."""

    def __init__(self, model: Model, seed: int, counts: Counts) -> None:
        self.random = random.Random(seed)
        self.model, self.counts = model, counts
        self.batch = Batch(model, PrefixTrie(2**22), self.random.choice([16, 64]))
        self.rows: list[tuple[Row, RecordingSampler, SamplingParams]] = []
        # Few forms, so that one finds what another left.
        self.forms = self.random.sample(list(FORMS), 3)

    def play(self, requests: int) -> None:
        coming = requests
        while coming or len(self.batch):
            if coming and (not len(self.batch) or self.random.random() < 0.4):
                self._join()
                coming -= 1
            for event in self.batch.turn():
                assert event.error is None, event.error
            present = [*self.batch.running, *self.batch.waiting]
            if present and self.random.random() < 0.03:
                self.batch.leave(self.random.choice(present))
                self.counts.left_early += 1
        for row, sampler, params in self.rows:
            self._compare(row, sampler, params)
        self.counts.rows += len(self.rows)

    def _join(self) -> None:
        prompt = self._prompt()
        name = self.random.choice(self.forms)
        self.counts.forms.add(name)
        params = SamplingParams(
            temperature=self.random.choice([0.0, 0.9]),
            top_p=self.random.choice([1.0, 0.9]),
            top_k=self.random.choice([0, 0, 5]),
            repetition_penalty=self.random.choice([1.0, 1.3]),
            presence_penalty=self.random.choice([0.0, 0.5]),
            seed=self.random.randrange(1000),
        )
        sampler = RecordingSampler(params, prompt)
        row = Row(prompt, sampler, self.random.choice([1, 5, 12, 40]), form=FORMS[name])
        self.rows.append((row, sampler, params))
        self.batch.join(row)

    def _prompt(self) -> list[int]:
        """Now and then one that goes on from an earlier one, with its answer or without."""
        start: list[int] = []
        if self.rows and self.random.random() < 0.6:
            row, _, _ = self.random.choice(self.rows)
            start = row.ids[: self.random.choice([row.prompt_tokens, len(row.ids), 20])]
        count = self.random.choice([1, 3, 20, 90])
        return [*start, *(self.random.randrange(FIRST_ID, 330) for _ in range(count))]

    def _compare(self, row: Row, sampler: RecordingSampler, params: SamplingParams) -> None:
        drawn = answer(row)
        if not drawn:
            return
        self.counts.reused += row.reused > 0
        expected = alone(self.model, row.ids[:-1], row.prompt_tokens, row.form)
        again = Sampler(params, row.ids[: row.prompt_tokens], VOCABULARY)
        for found, wanted, token in zip(sampler.logits(len(drawn)), expected, drawn, strict=True):
            scale = np.abs(wanted).max()
            error = float(np.abs(found - wanted).max() / scale)
            self.counts.compared += 1
            if row.form.quantized and error > TOLERANCE:
                # Rounding moved a number across the border between two codes.
                assert error < TOLERANCE_OF_CODES
                self.counts.beyond += 1
            else:
                self.counts.worst = max(self.counts.worst, error)
                assert error <= TOLERANCE
            choice = int(again(NextTokenLogits(mx.array(found))))
            assert token == choice, "another seed, penalty or order of draws than alone"
            second, best = np.partition(wanted, -2)[-2:]
            plain = params.repetition_penalty == 1 and params.presence_penalty == 0
            if params.greedy and plain and best - second > 2 * error * scale:
                assert token == int(wanted.argmax())


def play_many(model: Model, seeds: Iterator[int] | range, requests: int) -> Counts:
    counts = Counts()
    for seed in seeds:
        Play(model, seed, counts).play(requests)
    return counts
