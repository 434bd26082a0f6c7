"""A block of positions that is taken back leaves a cache as if it had never come."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from apertus_mlx.cache import Cache, allow_cut, make_layer_cache, rewind
from apertus_mlx.cache.attention import attend
from apertus_mlx.cache.config import CacheConfig
from tests.cache_sequences import FORMS

HEAD = 32
MOST = 5
# Far enough for every small ring to have turned twice.
POSITIONS = 260


def rows(rng: np.random.Generator, count: int) -> tuple[mx.array, mx.array]:
    both = rng.standard_normal((2, 1, 1, count, HEAD)).astype(np.float32)
    return mx.array(both[0]), mx.array(both[1])


def seen(cache: Cache, keys: mx.array, values: mx.array) -> np.ndarray:
    """What a query at each new position makes of the cache, once the rows are written."""
    mask = cache.make_mask(keys.shape[2])
    return np.array(attend(keys, *cache.update_and_fetch(keys, values), 1.0, mask))


def cut_everywhere(config: CacheConfig, levels: range, joined: bool = False) -> None:
    cut, never = (make_layer_cache(config, HEAD, joined) for _ in range(2))
    assert allow_cut([cut], MOST)
    rng = np.random.default_rng(5)
    for level in range(levels.stop):
        if level in levels:
            count = 2 + level % (MOST - 1)
            mx.eval(mx.array(seen(cut, *rows(rng, count))))
            assert rewind([cut], count)
        keys, values = rows(rng, 1)
        np.testing.assert_array_equal(seen(cut, keys, values), seen(never, keys, values))
        assert cut.offset == never.offset == level + 1


@pytest.mark.parametrize("name", ["full", "bounded", "4 bits, bounded"])
def test_draft_and_reject_all_at_every_fill_level(name: str) -> None:
    config = FORMS[name]
    least = 0 if config.bound is None else config.bound - 30
    cut_everywhere(config, range(max(least, 0), max(least, 0) + 90))


@pytest.mark.nightly
@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("name", FORMS)
def test_the_same_of_all_forms_from_the_start(name: str, joined: bool) -> None:
    cut_everywhere(FORMS[name], range(POSITIONS), joined)


@pytest.mark.parametrize("kept", range(1, MOST))
def test_a_ring_goes_back_part_of_a_block(kept: int) -> None:
    # Against numpy, which sees the sinks and the latest of all rows that were ever kept.
    config = CacheConfig(bound=11, sinks=3)
    cache = make_layer_cache(config, HEAD)
    assert allow_cut([cache], MOST - 1)
    rng = np.random.default_rng(kept)
    history: list[tuple[mx.array, mx.array]] = []
    for _ in range(12):
        keys, values = rows(rng, MOST)
        mx.eval(cache.update_and_fetch(keys, values))
        assert rewind([cache], MOST - kept)
        history += [(keys[0, 0, i], values[0, 0, i]) for i in range(kept)]
    keys, values = rows(rng, 1)
    found = seen(cache, keys, values)[0, 0, 0]
    history.append((keys[0, 0, 0], values[0, 0, 0]))
    kept_rows = history[:3] + history[3:][-8:]
    all_keys, all_values = (np.stack([np.array(r) for r in each], dtype=np.float64)
                            for each in zip(*kept_rows, strict=True))  # fmt: skip
    scores = all_keys @ np.array(keys[0, 0, 0], np.float64)
    weights = np.exp(scores - scores.max())
    np.testing.assert_allclose(found, weights / weights.sum() @ all_values, rtol=1e-4, atol=1e-5)


def test_without_leave_a_ring_goes_back_no_further_than_before() -> None:
    cache = make_layer_cache(CacheConfig(bound=11, sinks=3), HEAD)
    cache.update_and_fetch(*rows(np.random.default_rng(0), 20))
    cache.update_and_fetch(*rows(np.random.default_rng(0), 3))
    assert not rewind([cache], 1)
    assert not allow_cut([object()], 1)  # type: ignore[list-item]
