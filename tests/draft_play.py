"""Random answers with drafts of all kinds, held against plain decoding with the same seed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from apertus_mlx.backend.choose import Compute
from apertus_mlx.cache import CacheConfig
from apertus_mlx.generation.cached_prefix import CachedPrefix
from apertus_mlx.generation.decode import draw_tokens
from apertus_mlx.generation.draft_pace import FixedPace
from apertus_mlx.generation.drafts import LookupDraft, ModelDraft
from apertus_mlx.generation.model_folder import open_folder
from apertus_mlx.generation.options import RunOptions
from apertus_mlx.generation.sampling import Sampler, SamplingParams, filter_logits
from apertus_mlx.generation.speculate import Draft, Draw, Speculation, Speculator
from apertus_mlx.generation.thought_budget import ThoughtBudget
from apertus_mlx.model.language_model import LanguageModel, NextTokenLogits
from tests.builders import config_4x, random_weights, write_checkpoint
from tests.cache_sequences import FORMS, TOLERANCE, TOLERANCE_OF_CODES

VOCABULARY = 384
# With fewer the likeliest token may be another than in full precision.
PRECISE_BITS = 6
KINDS = ("right", "wrong", "random", "another", "2 bits", "lookup")


class Wrong:
    """Never guesses what another draft, which is right, guesses."""

    def __init__(self, right: Draft) -> None:
        self._right = right
        self.ended: str | None = None

    def begin(self, ids: Sequence[int]) -> None:
        self._right.begin(ids)

    def propose(self, ids: Sequence[int], most: int, draw: Draw) -> mx.array | None:
        guesses = self._right.propose(ids, most, draw)
        return None if guesses is None else (guesses + 1) % VOCABULARY


class Random:
    """Guesses any ids, and now and then none."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self.ended: str | None = None

    def begin(self, ids: Sequence[int]) -> None:
        del ids

    def propose(self, ids: Sequence[int], most: int, draw: Draw) -> mx.array | None:
        del ids, draw
        count = self._random.randint(0, most)
        return mx.array(self._random.choices(range(VOCABULARY), k=count)) if count else None


@dataclass(frozen=True)
class Models:
    """A model on some compute, and what drafts for it."""

    target: LanguageModel
    same: LanguageModel
    other: LanguageModel
    coarse: LanguageModel

    def draft(self, kind: str, seed: int) -> Draft:
        def of(model: LanguageModel) -> ModelDraft:
            return ModelDraft(model, 512, VOCABULARY)

        return {
            "right": lambda: of(self.same),
            "wrong": lambda: Wrong(of(self.same)),
            "random": lambda: Random(seed),
            "another": lambda: of(self.other),
            "2 bits": lambda: of(self.coarse),
            "lookup": LookupDraft,
        }[kind]()


def load_models(base: Path, compute: Compute) -> Models:
    """A random model, another of another size, and the first with its matrices in 2 bits."""
    config = config_4x(head_dim=32)
    small = config_4x(head_dim=32, hidden_size=32, num_hidden_layers=1)
    one = write_checkpoint(base / "one", config)
    two = write_checkpoint(base / "two", small, random_weights(small, 1))

    def load(folder: Path, compute: Compute = compute) -> Any:
        return open_folder(folder).load(RunOptions(compute=compute, dtype="float32")).model

    coarse = load(one, "mlx")
    nn.quantize(coarse, group_size=32, bits=2)
    return Models(load(one), load(one), load(two), coarse)


@dataclass(frozen=True)
class Play:
    """One answer that is to come out the same."""

    form: str
    kind: str
    ahead: int
    prompt: tuple[int, ...]
    params: SamplingParams
    thoughts: int | None
    tokens: int
    seed: int

    def sampler(self) -> Sampler:
        budget = None if self.thoughts is None else ThoughtBudget(self.thoughts, [(69, 70)], 71, 69)
        return Sampler(self.params, self.prompt, VOCABULARY, budget)

    def plain(self, model: LanguageModel) -> tuple[list[int], CachedPrefix]:
        prefix = CachedPrefix(model, FORMS[self.form])
        run = prefix.begin(self.prompt)
        return list(draw_tokens(run.step, run.read(), self.sampler(), self.tokens)), prefix

    def drafted(self, models: Models) -> tuple[list[int], CachedPrefix, Speculation]:
        prefix = CachedPrefix(models.target, FORMS[self.form])
        pace = FixedPace(self.ahead)
        prefix.allow_cut(pace.most)
        run = prefix.begin(self.prompt)
        draft = models.draft(self.kind, self.seed)
        speculator = Speculator(run, draft, pace, self.prompt, self.sampler())
        tokens = list(speculator.tokens(run.read(), self.tokens))
        return tokens, prefix, speculator.found


def random_play(seed: int, forms: Sequence[str] = tuple(FORMS)) -> Play:
    """Any settings together."""
    chance = random.Random(seed)
    greedy = chance.random() < 0.2
    params = SamplingParams(
        temperature=0 if greedy else chance.choice([0.3, 0.8, 1.5]),
        top_p=chance.choice([1.0, 0.9, 0.5]),
        top_k=chance.choice([0, 0, 20]),
        min_p=chance.choice([0.0, 0.0, 0.1]),
        repetition_penalty=chance.choice([1.0, 1.3]),
        presence_penalty=chance.choice([0.0, 0.7]),
        frequency_penalty=chance.choice([0.0, 0.4]),
        logit_bias=chance.choice([{}, {100: 3.0, 101: -100.0}]),
        seed=seed,
    )
    # Around the ends of the small rings, and short ones.
    length = chance.choice([2, 20, 55, 88, 110, 138])
    alphabet = chance.sample(range(74, 330), chance.choice([6, 200]))
    return Play(
        form=chance.choice(list(forms)),
        kind=chance.choice(KINDS),
        ahead=chance.randint(1, 4),
        prompt=tuple(chance.choices(alphabet, k=length + chance.randint(0, 6))),
        params=params,
        thoughts=chance.choice([None, 3]),
        tokens=chance.randint(3, 7),
        seed=seed,
    )


def require_same(play: Play, models: Models) -> Speculation:
    """Play it both ways; a difference is allowed where rounding decides between two tokens."""
    found, prefix, speculation = play.drafted(models)
    if require_plain(play, models.target, found):
        assert prefix.tokens == [*play.prompt, *found][: len(prefix.tokens)]
        assert len(prefix.tokens) >= len(play.prompt) + play.tokens - 1
    return speculation


def require_plain(play: Play, model: LanguageModel, found: Sequence[int]) -> bool:
    """That `found` are the tokens of plain decoding; False where rounding decided otherwise."""
    expected, _ = play.plain(model)
    assert len(found) == play.tokens
    at = next(
        (i for i, pair in enumerate(zip(found, expected, strict=True)) if len({*pair}) > 1), None
    )
    if at is None:
        return True
    gap, scale = _gap(play, model, expected[:at])
    tolerance = TOLERANCE_OF_CODES if FORMS[play.form].quantized else TOLERANCE
    assert gap <= tolerance * scale, (play, at, gap, scale)
    return False


def _gap(play: Play, model: LanguageModel, before: Sequence[int]) -> tuple[float, float]:
    """Between the two best scores, noise included, of the token behind `before`; their scale."""
    sampler = play.sampler()
    prefix = CachedPrefix(model, FORMS[play.form])
    run = prefix.begin(play.prompt)
    after = NextTokenLogits(run.read())
    for token in before:
        sampler(after)
        after = run.step(mx.array(token))
    scale = mx.abs(after.values).max().item()
    scores = sampler._adjust(after).values
    if not play.params.greedy:
        _, key = mx.random.split(sampler.state.key)
        scores = filter_logits(NextTokenLogits(scores), play.params)
        scores = scores + mx.random.gumbel(scores.shape, key=key)
    best = mx.sort(scores)[-2:]
    return (best[1] - best[0]).item(), float(scale)  # type: ignore[arg-type, return-value]


def loses_nothing(play: Play) -> bool:
    """Whether the model's cache is near one in full precision, which a draft's is."""
    form, longest = FORMS[play.form], len(play.prompt) + play.tokens
    exact = min(form.key_bits, form.value_bits) >= PRECISE_BITS
    return exact and (form.bound is None or form.bound >= longest)


def forms_but(*without: str) -> list[str]:
    return [name for name in FORMS if name not in without]


__all__ = [
    "KINDS", "CacheConfig", "Models", "Play", "load_models", "loses_nothing", "random_play",
    "require_plain", "require_same",
]  # fmt: skip
