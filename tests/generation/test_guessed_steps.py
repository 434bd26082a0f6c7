"""A row of a batch that has a draft while it is alone says what plain decoding says."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import pytest

from apertus_mlx.generation.batch import Batch
from apertus_mlx.generation.draft_pace import FixedPace, MeasuredPace
from apertus_mlx.generation.drafts import Drafting
from apertus_mlx.generation.guessed_steps import GuessedSteps
from apertus_mlx.generation.row import Row
from apertus_mlx.generation.speculate import Draw
from tests.batch_play import answer
from tests.cache_sequences import FORMS
from tests.draft_play import Models, Play, loses_nothing, random_play, require_plain


def row_of(play: Play) -> Row:
    return Row(play.prompt, play.sampler(), play.tokens, form=FORMS[play.form])


def batch_of(play: Play, models: Models, **given: Any) -> Batch:
    drafting = Drafting(models.draft(play.kind, play.seed), FixedPace(play.ahead))
    return Batch(models.target, guessed=GuessedSteps(models.target, drafting), **given)


def turn(batch: Batch) -> list[Any]:
    events = list(batch.turn())
    for event in events:
        assert event.error is None, event.error
    return events


def run(batch: Batch) -> None:
    while len(batch):
        turn(batch)


def play_all(models: Models, seeds: Sequence[int]) -> None:
    """One row, beside which another comes and goes at any time; sometimes the first is dropped."""
    drafted: Counter[str] = Counter()
    accepted: Counter[str] = Counter()
    for seed in seeds:
        play, beside, chance = random_play(seed), random_play(seed + 1000), random.Random(seed)
        batch = batch_of(play, models, shared_step=16)
        first, second = row_of(play), row_of(beside)
        told: list[int] = []
        batch.join(first)
        joins, ends = chance.randint(0, 6), chance.choice([99, chance.randint(1, 8)])
        for moment in range(200):
            if moment == joins:
                batch.join(second)
            if moment == ends:
                batch.leave(first)
            events = turn(batch)
            told += [
                event.token for event in events if event.row is first and event.token is not None
            ]
            if not len(batch) and moment > joins:
                break
        assert not len(batch)
        assert told == answer(first)
        if ends == 99:
            require_plain(play, models.target, answer(first))
        require_plain(beside, models.target, answer(second))
        # The draft is that of the first play, whichever row it guesses for.
        for row, played in ((first, play), (second, beside)):
            exact = play.kind != "right" or loses_nothing(played)
            if row.speculation is not None and exact:
                drafted[play.kind] += row.speculation.drafted
                accepted[play.kind] += row.speculation.accepted
    assert accepted["wrong"] == 0 < drafted["wrong"]
    assert accepted["right"] > 0.9 * drafted["right"]


def test_alone_or_not_the_text_is_the_same(models: Models) -> None:
    play_all(models, range(4))


@pytest.mark.nightly
def test_the_same_of_many(models: Models) -> None:
    play_all(models, range(24, 324))


def test_right_guesses_come_together(models: Models) -> None:
    """Each with the logits that the next was drawn from, and with fewer passes than tokens."""
    play = next(each for seed in range(400) if (each := random_play(seed)).kind == "right"
                and each.ahead == 4 and each.tokens == 7)  # fmt: skip
    batch, row = batch_of(play, models), row_of(play)
    batch.join(row)
    steps = []
    while len(batch):
        if tokens := [event for event in turn(batch) if event.token is not None]:
            steps.append(tokens)
    assert [len(tokens) for tokens in steps] == [5, 2]
    assert row.speculation is not None and row.speculation.report() == {
        "drafted": 5, "accepted": 5, "passes": 2, "tokens_per_pass": 3.5, "off": None,
        "row_costs": None,
    }  # fmt: skip
    caches = models.target.make_cache(FORMS[play.form])
    expected = models.target(mx.array([row.ids[:-1]]), caches)[0, len(play.prompt) - 1 :]
    for event, logits in zip((each for step in steps for each in step), expected, strict=True):
        if not FORMS[play.form].quantized and FORMS[play.form].bound is None:
            assert mx.abs(event.logits - logits).max().item() < 1e-4


class Failing:
    """A draft that breaks when it is asked."""

    ended: str | None = None

    def begin(self, ids: Sequence[int]) -> None:
        del ids

    def propose(self, ids: Sequence[int], most: int, draw: Draw) -> mx.array | None:
        raise RuntimeError("no memory")


def test_a_draft_that_fails_costs_no_answer(models: Models) -> None:
    play = random_play(5)
    guessed = GuessedSteps(models.target, Drafting(Failing(), FixedPace(2)))
    batch, row = Batch(models.target, guessed=guessed), row_of(play)
    batch.join(row)
    run(batch)
    require_plain(play, models.target, answer(row))
    assert row.speculation is not None and row.speculation.off == "a pass has failed"
    assert batch.faults == 1


def test_plain_steps_alone_tell_the_pace_how_long_they_take(models: Models) -> None:
    pace = MeasuredPace()
    play = random_play(5)
    drafting = Drafting(models.draft("right", 0), pace)
    batch = Batch(models.target, guessed=GuessedSteps(models.target, drafting))
    row = Row(play.prompt, play.sampler(), 40, form=FORMS[play.form])
    batch.join(row)
    first = 0
    while len(batch):
        first += 1 if turn(batch) and pace.ahead == 0 and not pace.seconds else 0
    assert set(pace.seconds) > {0}
    assert len(answer(row)) == 40
    assert row.speculation is not None and row.speculation.accepted > 0
