"""What the trie gives is a prefix that was kept, as computed from scratch, and the longest."""

from __future__ import annotations

import logging
import random

import mlx.core as mx
import numpy as np
import pytest

from apertus_mlx.backend.mlx import load_model
from apertus_mlx.cache import Cache, CacheConfig, fork
from apertus_mlx.generation.prefix_segments import Segment
from apertus_mlx.generation.prefix_trie import PrefixTrie
from apertus_mlx.model.apertus import Model
from tests.builders import config_4x, write_checkpoint
from tests.cache_sequences import FORMS, TOLERANCE, TOLERANCE_OF_CODES
from tests.daily import every

FULL = CacheConfig()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    config = config_4x(num_attention_heads=2, head_dim=32, max_position_embeddings=4096)
    return load_model(write_checkpoint(tmp_path_factory.mktemp("model"), config))


def computed(model: Model, ids: list[int], form: CacheConfig = FULL) -> list[Cache]:
    caches = model.make_cache(form)
    mx.eval(model(mx.array([ids]), caches))
    return caches


def logits(model: Model, ids: list[int], caches: list[Cache]) -> np.ndarray:
    return np.array(model(mx.array([ids]), caches)[0, -1])


def shared(a: list[int], b: list[int]) -> int:
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def require_counts(trie: PrefixTrie) -> None:
    """Segments count what hangs behind them, none is empty, and bytes add up."""

    def visit(segment: Segment) -> int:
        count = segment.snapshot is not None
        for first, child in segment.children.items():
            assert child.parent is segment and child.ids[0] == first
            count += visit(child)
        assert segment.count == count and (count or segment.parent is None)
        return count

    total = sum(visit(root) for root in trie._roots.values())
    found = [s for root in trie._roots.values() for s in root.snapshots()]
    assert total == len(trie) == len(found)
    assert trie.nbytes == sum(layer.nbytes for s in found for layer in s.caches) <= trie.limit


def play(model: Model, form: CacheConfig, seed: int, turns: int) -> int:
    """Prompts of two letters that go on from each other, kept and found at random."""
    chance = random.Random(seed)
    trie = PrefixTrie(2**40)
    kept: list[list[int]] = []
    hits = 0
    cuttable = not form.quantized and form.bound is None
    for _ in range(turns):
        start = chance.choice(kept)[: chance.choice([3, 30, 90, 500])] if kept else []
        ids = start + [chance.choice([80, 90]) for _ in range(chance.choice([1, 2, 40, 150]))]
        hit = trie.find(ids, form)
        whole = max((len(k) for k in kept if k == ids[:-1][: len(k)]), default=0)
        best = max((shared(k, ids[:-1]) for k in kept), default=0)
        length = 0 if hit is None else hit.length
        assert length == best if cuttable else whole <= length <= best
        caches = model.make_cache(form) if hit is None else hit.caches
        hits += hit is not None
        found = logits(model, ids[length:], caches)
        expected = logits(model, ids, model.make_cache(form))
        error = np.abs(found - expected).max() / np.abs(expected).max()
        assert error <= (TOLERANCE_OF_CODES if form.quantized else TOLERANCE)
        trie.keep(ids, form, caches)
        kept.append(ids)
        require_counts(trie)
    return hits


@pytest.mark.parametrize("form", every(6, FORMS))
def test_random_prompts(model: Model, form: str) -> None:
    assert play(model, FORMS[form], 1, 8)


@pytest.mark.nightly
@pytest.mark.parametrize("form", FORMS)
def test_many_random_prompts(model: Model, form: str) -> None:
    assert sum(play(model, FORMS[form], seed, 30) for seed in range(2, 10)) > 100


@pytest.mark.parametrize("name", every(2, FORMS))
def test_nobody_changes_what_is_kept(model: Model, name: str) -> None:
    """Whoever goes on from a snapshot, and the row that left it, write elsewhere."""
    form = FORMS[name]
    trie = PrefixTrie(2**30)
    ids = [80 + i % 7 for i in range(100)]
    caches = computed(model, ids, form)
    trie.keep(ids, form, fork(caches))
    expected = logits(model, [85], fork(caches))
    for token in (90, 91):
        logits(model, [token] * 40, caches)
        hit = trie.find([*ids, 85], form)
        assert hit is not None and hit.length == 100
        logits(model, [token] * 3, hit.caches)
    hit = trie.find([*ids, 85], form)
    assert hit is not None
    assert np.array_equal(logits(model, [85], hit.caches), expected)


def test_one_token_is_always_left(model: Model) -> None:
    trie = PrefixTrie(2**30)
    ids = [80, 81, 82]
    trie.keep(ids, FULL, computed(model, ids))
    hit = trie.find(ids, FULL)
    assert hit is not None and hit.length == 2 and hit.caches[0].offset == 2
    assert trie.find([80], FULL) is None and trie.find([90, 91], FULL) is None
    assert trie.find(ids, CacheConfig(bound=60)) is None, "another form"


def test_a_longer_full_cache_takes_the_place_of_a_shorter(model: Model) -> None:
    trie = PrefixTrie(2**30)
    for length in (10, 30, 20):
        trie.keep(list(range(80, 80 + length)), FULL, computed(model, list(range(80, 80 + length))))
    assert len(trie) == 1
    hit = trie.find(list(range(80, 200)), FULL)
    assert hit is not None and hit.length == 30
    form = CacheConfig(bound=60)
    for length in (10, 30, 20):
        ids = list(range(80, 80 + length))
        trie.keep(ids, form, computed(model, ids, form))
    assert len(trie) == 4


def test_bytes_are_bounded(model: Model) -> None:
    """What is neither new nor reused goes first; what does not fit at all is not kept."""
    size = sum(layer.nbytes for layer in computed(model, [80]))
    trie = PrefixTrie(3 * size)
    for first in (80, 81, 82):
        trie.keep([first, 90], FULL, computed(model, [first, 90]))
    # The oldest is a conversation that goes on.
    assert trie.find([80, 90, 91], FULL) is not None
    for first in (83, 84):
        trie.keep([first, 90], FULL, computed(model, [first, 90]))
        require_counts(trie)
    held = [first for first in range(80, 85) if trie.find([first, 90, 91], FULL) is not None]
    assert held == [80, 83, 84] and trie.nbytes == 3 * size
    long = [85] * 800
    trie.keep(long, FULL, computed(model, long))
    assert len(trie) == 3
    trie.shrink(size)
    assert len(trie) == 1
    trie.clear()
    assert len(trie) == trie.nbytes == 0 and trie.find([80, 90, 91], FULL) is None


def test_snapshots_are_counted_too(model: Model) -> None:
    trie = PrefixTrie(2**30, most=2)
    for first in (80, 81, 82):
        trie.keep([first, 90], FULL, computed(model, [first, 90]))
        require_counts(trie)
    assert len(trie) == 2 and trie.find([80, 90, 91], FULL) is None


@pytest.mark.parametrize("name", ["full", "4 bits"])
def test_what_is_taken_is_there_no_more(model: Model, name: str) -> None:
    """Caches that are handed on instead of copied go on as fresh ones do."""
    form, ids = FORMS[name], list(range(80, 180))
    trie = PrefixTrie(2**30)
    kept = computed(model, ids, form)
    trie.keep(ids, form, kept)
    # Codes cannot be cut back far.
    ending = ids[: 70 if name == "full" else 100]
    hit = trie.take([*ending, 300, 301], form)
    assert hit is not None and hit.length == len(ending) and len(trie) == trie.nbytes == 0
    assert all(one is other for one, other in zip(hit.caches, kept, strict=True))
    found = np.array(model(mx.array([[300, 301]]), hit.caches)[0, -1])
    fresh = computed(model, ending, form)
    assert np.array_equal(found, np.array(model(mx.array([[300, 301]]), fresh)[0, -1]))
    assert trie.take([*ending, 300, 301], form) is None


def test_room_that_is_not_needed_is_given_back(model: Model) -> None:
    caches = model.make_cache()
    for layer in caches:
        layer.expect(20_000)  # type: ignore[attr-defined]
    mx.eval(model(mx.array([[80, 81]]), caches))
    assert caches[0].nbytes > 2**20
    trie = PrefixTrie(2**30)
    trie.keep([80, 81], FULL, fork(caches))
    assert trie.nbytes < 2**20


def test_a_log_shows_where_prompts_part(model: Model, caplog: pytest.LogCaptureFixture) -> None:
    trie = PrefixTrie(2**30, describe=lambda token: f"<{token}>")
    with caplog.at_level(logging.DEBUG, "apertus_mlx.generation.prefix_trie"):
        ids = [80, 81, 82, 83, 84]
        trie.keep(ids, FULL, computed(model, ids))
        trie.find([*ids, 85], FULL)
        assert not caplog.messages, "nothing parts"
        trie.find([80, 81, 99, 83, 84], FULL)
    (message,) = caplog.messages
    assert "shares 2 of its 5 tokens" in message and "'<99>'" in message and "'<82>'" in message
