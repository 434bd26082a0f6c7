"""How far a draft guesses: against every choice tried on a machine of known speed."""

from __future__ import annotations

import random
from statistics import mean

import mlx.core as mx
import numpy as np
import pytest

from apertus_mlx.generation.draft_pace import FIRST_REST, MeasuredPace


def played(
    share: float, costs: list[float], tokens: int, pace: MeasuredPace, seed: int = 1
) -> float:
    """Tokens a second on a machine whose passes with k guesses take `costs[k]` seconds."""
    chance = random.Random(seed)
    done, seconds = 0, 0.0
    while done < tokens:
        if not pace.ahead:
            seconds += pace.rest * costs[0]
            done += pace.rest
            pace.rested(pace.rest, pace.rest * costs[0])
            continue
        ahead, right = pace.ahead, 0
        while right < ahead and chance.random() < share:
            right += 1
        seconds += costs[ahead]
        done += right + 1
        pace.passed(ahead, right, costs[ahead])
    return done / seconds


def fixed(share: float, costs: list[float], ahead: int) -> float:
    """Tokens a second if it always guesses so far: the sum of a geometric series over the cost."""
    return float(sum(share**k for k in range(ahead + 1)) / costs[ahead])


# Costs of 1 to 5 rows relative to one: M4 Pro at 4 bits with a draft of 6 % (ml-explore/mlx#3852);
# no cost but the draft's; and a CPU, where rows cost what they cost alone.
M4_PRO = [1.0, 1.05, 1.25, 1.61, 1.99]
LIGHT = [1.0, 1.06, 1.12, 1.18, 1.24]
CPU = [1.0, 1.9, 2.8, 3.7, 4.6]


@pytest.mark.parametrize("costs", [M4_PRO, LIGHT, CPU])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.7, 0.9])
def test_it_is_nearly_as_fast_as_the_best_choice(costs: list[float], share: float) -> None:
    pace = MeasuredPace()
    found = played(share, costs, 4000, pace)
    best = max(fixed(share, costs, k) for k in range(len(costs)))
    assert found > 0.92 * best
    assert found > 0.97 * fixed(share, costs, 0)


# Without a draft's own cost: of 1 to 5 rows alone.
ROWS = [1.0, 0.99, 1.13, 1.43, 1.75]


def begun(costs: list[float]) -> MeasuredPace:
    """A pace that knows `costs`, once it has seen that a token takes a second."""
    pace = MeasuredPace(costs=costs)
    assert (pace.ahead, pace.rest, pace.row_costs) == (0, FIRST_REST, "doctor")
    pace.rested(FIRST_REST, float(FIRST_REST))
    return pace


@pytest.mark.parametrize("costs", [ROWS, M4_PRO, LIGHT, CPU, [1, 1.2]])
def test_the_first_guess_goes_as_far_as_the_doctors_costs_promise(costs: list[float]) -> None:
    """At the share that is taken for granted at first; two costs go on as a straight line."""
    whole = costs if len(costs) == 5 else [1 + 0.2 * k for k in range(5)]
    expected = max(range(1, 5), key=lambda k: fixed(0.7, whole, k))
    assert begun(costs).ahead == expected
    assert MeasuredPace().row_costs == "measured"


@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
@pytest.mark.parametrize("told", [ROWS, CPU, [1, 2, 3, 4, 5]])
@pytest.mark.parametrize("true", [M4_PRO, LIGHT, CPU])
def test_wrong_costs_are_corrected(told: list[float], true: list[float], share: float) -> None:
    pace = MeasuredPace(costs=told)
    found = played(share, true, 4000, pace)
    assert found > 0.92 * max(fixed(share, true, k) for k in range(5))
    assert found > 0.97 * fixed(share, true, 0)


def test_right_costs_save_what_finding_them_out_takes() -> None:
    """In a short answer."""
    for share in (0.7, 0.9):
        told, alone = (
            mean(played(share, LIGHT, 60, MeasuredPace(costs=costs), seed) for seed in range(100))
            for costs in (LIGHT, ())
        )
        assert told > 1.02 * alone


def test_nothing_is_tried_at_first_where_rows_cost_what_they_cost_alone() -> None:
    pace = begun([1, 2, 3.1, 4, 5.2])
    assert (pace.ahead, pace.rest, pace.off) == (0, 64, "slower than without")
    # Costs on paper are no reason never to try.
    pace.rested(64, 64.0)
    assert pace.ahead > 0 and pace.off is None


def test_it_turns_itself_off_and_says_so() -> None:
    pace = MeasuredPace()
    assert (pace.ahead, pace.rest) == (0, FIRST_REST)
    rests = []
    for _ in range(200):
        played(0.1, CPU, 1, pace)
        if not pace.ahead:
            assert pace.off == "slower than without"
            rests.append(pace.rest)
    assert rests[:4] == [64, 128, 256, 512] and max(rests) == 1024


def test_a_rest_is_longer_than_an_answer() -> None:
    pace = MeasuredPace()
    played(0.0, CPU, 30, pace)
    while pace.ahead:
        played(0.0, CPU, 1, pace)
    rest = pace.rest
    pace.rested(rest - 1, 1.0)
    assert (pace.ahead, pace.rest) == (0, 1) and pace.off is not None
    pace.rested(1, 1.0)
    assert pace.ahead == 1


def test_it_comes_back_when_guesses_become_right() -> None:
    pace = MeasuredPace()
    played(0.0, LIGHT, 100, pace)
    assert pace.share < 0.1
    played(0.95, LIGHT, 2000, pace)
    assert pace.ahead == 4 and pace.off is None


def test_the_same_key_makes_a_draft_right_nearly_as_often_as_can_be() -> None:
    """Between the bound of this coupling, (1 - TV) / (1 + TV), and the rejection rule's sum."""
    rng = np.random.default_rng(0)
    keys = mx.random.split(mx.random.key(7), 400)
    for sharpness, noise in ((1.0, 0.3), (3.0, 0.6), (3.0, 1.5)):
        logits = rng.standard_normal(200) * sharpness
        other = logits + rng.standard_normal(200) * noise
        p, q = (np.exp(x - x.max()) / np.exp(x - x.max()).sum() for x in (logits, other))
        overlap, independent = np.minimum(p, q).sum(), (p * q).sum()
        drawn = [
            [mx.random.categorical(mx.array(x, mx.float32), key=key) for key in keys]
            for x in (logits, other)
        ]
        ours, theirs = (np.array(mx.stack(each)) for each in drawn)
        found, error = np.mean(ours == theirs), 3 * 0.5 / len(keys) ** 0.5
        assert overlap / (2 - overlap) - error <= found <= overlap + error
        assert found > independent
