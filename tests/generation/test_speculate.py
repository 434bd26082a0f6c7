"""Text with a draft is text without: drafts that are right, wrong or neither, and all forms."""

from __future__ import annotations

from collections import Counter

import pytest

from apertus_mlx.model.apertus import Model
from tests.draft_play import Models, loses_nothing, random_play, require_same

DAILY, NIGHTLY = 100, 1000


def play_all(models: Models, seeds: range) -> None:
    drafted: Counter[str] = Counter()
    accepted: Counter[str] = Counter()
    for seed in seeds:
        play = random_play(seed)
        found = require_same(play, models)
        if play.kind == "right" and not loses_nothing(play):
            continue
        drafted[play.kind] += found.drafted
        accepted[play.kind] += found.accepted
    assert accepted["wrong"] == 0
    # Two ids are never drafted.
    assert accepted["right"] > 0.9 * drafted["right"]
    assert 0 < accepted["2 bits"] < drafted["2 bits"]


def test_text_with_a_draft_is_text_without(models: Models) -> None:
    by_mlx = range(DAILY // 4)
    play_all(models, by_mlx if isinstance(models.target, Model) else range(len(by_mlx), DAILY))


@pytest.mark.nightly
def test_the_same_of_many(models: Models) -> None:
    play_all(models, range(DAILY, DAILY + NIGHTLY // 2))
