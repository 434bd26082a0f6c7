"""Ranks that follow rank 0: they compute the same passes, whatever it forks, cuts and lets go."""

from __future__ import annotations

import gc
import random
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from threading import BrokenBarrierError
from typing import Any, cast

import mlx.core as mx
import pytest

from apertus_mlx.backend.mlx import load_inventory
from apertus_mlx.backend.ranks import Ranks as RealRanks
from apertus_mlx.cache import Cache, CacheConfig
from apertus_mlx.checkpoint.inventory import take_inventory
from apertus_mlx.errors import ApertusError
from apertus_mlx.generation.batch import Batch, Row
from apertus_mlx.generation.led_model import Order, end, follow, lead
from apertus_mlx.generation.prefix_trie import PrefixTrie
from apertus_mlx.model.apertus import Model
from apertus_mlx.model.split import part_of
from apertus_mlx.model.split_model import SplitModel
from tests.batch_play import answer, new_row
from tests.builders import config_4x, write_checkpoint
from tests.links import Table


class Heard:
    """A decoder whose outputs are kept."""

    def __init__(self, decoder: Any) -> None:
        self.decoder, self.layers = decoder, decoder.layers
        self.norm, self.embed_tokens = decoder.norm, decoder.embed_tokens
        self.hidden: list[mx.array] = []

    def __call__(self, inputs: mx.array, cache: Sequence[Cache]) -> mx.array:
        self.hidden.append(self.decoder(inputs, cache))
        return self.hidden[-1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"), config_4x(head_dim=64))


class Ranks:
    """Rank 0 in this process, and what it told and sent."""

    def __init__(self, folder: Path, form: CacheConfig) -> None:
        self.form, self.folder = form, folder
        self.model = load_inventory(take_inventory(folder), "float32")
        self.orders: list[Order] = []
        self.sent: deque[mx.array] = deque()
        self.heard = Heard(self.model.model)
        lead(self.model, self.sum, self.orders.append)
        self.model.model._pass = self.heard

    def sum(self, inputs: mx.array) -> mx.array:
        self.sent.append(inputs)
        return inputs

    def follow(self) -> None:
        """Be rank 1, and compare each of its passes."""
        model = load_inventory(take_inventory(self.folder), "float32")
        heard = Heard(model.model)
        model.model = heard  # type: ignore[assignment]

        def summed(nothing: mx.array) -> mx.array:
            sent = self.sent.popleft()
            assert (nothing.shape, nothing.dtype) == (sent.shape, mx.uint32)
            return sent + nothing

        follow(model, self.form, summed, self.orders)
        assert len(heard.hidden) == len(self.heard.hidden)
        for own, first in zip(heard.hidden, self.heard.hidden, strict=True):
            assert mx.array_equal(own, first).item()

    def cached(self) -> set[int]:
        """Numbers of the caches that other ranks still hold."""
        told = {row[0] for order in self.orders for row in order["rows"]}
        return told - {number for order in self.orders for number in order["gone"]}


def play(
    ranks: Ranks, prefixes: PrefixTrie, draw: random.Random, check: Callable[[Row], None]
) -> None:
    """Prompts that begin alike, some of which leave early."""
    batch = Batch(ranks.model, prefixes, 64, 32)
    stems = [[1, *(draw.randrange(74, 330) for _ in range(40))] for _ in range(2)]
    rows: list[Row] = []
    for _ in range(10):
        stem = draw.choice([*stems, *(row.ids for row in rows)])[: draw.randrange(20, 60)]
        prompt = [*stem, *(draw.randrange(74, 330) for _ in range(9))]
        row, _ = new_row(prompt, ranks.form)
        row.boundaries = [len(stem)] if draw.random() < 0.3 else row.boundaries
        rows.append(row)
        batch.join(row)
        if draw.random() < 0.4:
            batch.reuse(row, take=True)
        for _ in range(draw.randrange(6)):
            list(batch.turn())
        if draw.random() < 0.3:
            batch.leave(draw.choice(rows))
    while len(batch):
        list(batch.turn())
    for row in rows:
        check(row)


@pytest.mark.parametrize(
    ("seed", "form", "most"),
    [
        (0, CacheConfig(), 9),
        *(
            pytest.param(seed, form, most, marks=pytest.mark.nightly)
            for form, most in (
                (CacheConfig(), 4),
                (CacheConfig(bound=48), 9),
                (CacheConfig(8, 8, window=8), 9),
            )
            for seed in range(2, 12)
        ),
    ],
)
def test_other_ranks_compute_the_same_passes(
    folder: Path, seed: int, form: CacheConfig, most: int
) -> None:
    ranks = Ranks(folder, form)
    alone = load_inventory(take_inventory(folder), "float32")

    def check(row: Row) -> None:
        if form != CacheConfig():  # what is read in chunks may fall to other codes
            return
        assert answer(row) == greedy(alone, row.ids[: row.prompt_tokens], form, len(answer(row)))

    prefixes = PrefixTrie(10**9, most=most)
    play(ranks, prefixes, random.Random(seed), check)
    assert any(len(order["rows"]) > 1 for order in ranks.orders)
    assert any(row[1] is not None for order in ranks.orders for row in order["rows"]) == (most > 0)
    # What rank 0 lets go the others let go with its next pass.
    prefixes.clear()
    gc.collect()
    ranks.model.next_token_logits(mx.array([[80]]), ranks.model.make_cache(form))
    assert len(ranks.cached()) == 1
    end(ranks.orders.append, interrupted=False)
    ranks.follow()


def greedy(model: Model, prompt: list[int], form: CacheConfig, count: int) -> list[int]:
    """One token after the other, of a prompt that is read at once."""
    cache = model.make_cache(form)
    ids = list(prompt)
    for _ in range(count):
        fed = mx.array([ids if len(ids) == len(prompt) else ids[-1:]])
        ids.append(int(mx.argmax(model(fed, cache)[0, -1])))
    return ids[len(prompt) :]


@pytest.mark.parametrize("form", [CacheConfig(8, 8, window=8), CacheConfig(bound=48)])
def test_a_prompt_goes_on_where_another_one_was_answered(folder: Path, form: CacheConfig) -> None:
    """In caches that cannot be cut back from the answer to the prompt."""
    ranks = Ranks(folder, form)
    batch = Batch(ranks.model, PrefixTrie(10**9), 64)
    prompt = [1, *range(80, 139)]
    first, _ = new_row(prompt, form, 50)
    second, _ = new_row([*prompt[:-1], 200], form, 2)
    for row in (first, second):
        batch.join(row)
        while len(batch):
            list(batch.turn())
    assert (len(answer(first)), second.reused) == (50, 59)
    ranks.follow()


@pytest.mark.parametrize("tied", [pytest.param(False, marks=pytest.mark.nightly), True])
def test_ranks_with_a_share_of_the_head_compute_all_logits(tmp_path: Path, tied: bool) -> None:
    """Of rows together, of one alone, and of many positions at a time."""
    given = write_checkpoint(tmp_path, config_4x(head_dim=64, tie_word_embeddings=tied))
    whole = take_inventory(given)
    alone = load_inventory(whole, "float32")
    table = Table(2)
    orders: SimpleQueue[Order] = SimpleQueue()

    def load(rank: int) -> SplitModel:
        links = cast(RealRanks, table.rank(rank))
        found = load_inventory(part_of(whole, 2, rank), "float32", ranks=links)
        assert isinstance(found, SplitModel)
        assert found.shares_head
        return found

    def other() -> None:
        with suppress(BrokenBarrierError):
            follow(load(1), CacheConfig(), table.rank(1).sum, iter(orders.get, None))

    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(other)
        try:
            model = load(0)
            lead(model, table.rank(0).sum, orders.put)
            batch = Batch(model, PrefixTrie(10**9), 64, 32)
            rows = [new_row([1, *range(80, 80 + 9 * count)]) for count in range(1, 4)]
            for row, _ in rows:
                batch.join(row)
            while len(batch):
                list(batch.turn())
            ids = mx.array([[1, *range(80, 120)]])
            hidden = model.model(ids, model.make_cache())
            found = model.logits(hidden[:, 7:30])
        except Exception:
            table.barrier.abort()
            raise
        finally:
            end(orders.put, interrupted=False)
        following.result()
    for row, sampler in rows:
        expected = alone(mx.array([row.ids]), alone.make_cache())[0, row.prompt_tokens - 1 : -1]
        assert_close(mx.stack([values for values, _ in sampler.drawn[:8]]), expected)
        assert answer(row) == mx.argmax(expected, axis=-1).tolist()
    assert_close(found, alone(ids, alone.make_cache())[:, 7:30])


def assert_close(found: mx.array, expected: mx.array) -> None:
    assert found.shape == expected.shape
    assert (mx.abs(found - expected).max() <= 1e-5 * mx.abs(expected).max()).item()


def test_an_interrupt_reaches_the_others(folder: Path) -> None:
    ranks = Ranks(folder, CacheConfig())
    end(ranks.orders.append, interrupted=True)
    with pytest.raises(KeyboardInterrupt):
        ranks.follow()


def test_after_a_pass_that_failed_there_is_no_other(folder: Path) -> None:
    ranks = Ranks(folder, CacheConfig())
    cache = ranks.model.make_cache()

    def fails(*_: object) -> mx.array:
        raise ValueError("no memory")

    ranks.model.model._pass = fails
    with pytest.raises(ValueError, match="no memory"):
        ranks.model(mx.array([[80]]), cache)
    ranks.model.model._pass = ranks.heard
    with pytest.raises(ApertusError, match="the ranks are out of step"):
        ranks.model(mx.array([[80]]), cache)


def test_ids_that_a_lost_connection_left_are_looked_up_nowhere(folder: Path) -> None:
    """There is nothing behind the last row of the embedding."""
    model = load_inventory(take_inventory(folder), "float32")
    orders = [{"rows": [[1, None, 0]], "shape": [1, 3], "gone": []}, {"end": "done"}]
    follow(model, CacheConfig(), lambda ids: mx.full(ids.shape, 2**32 - 1, mx.uint32), orders)
    expected = model(mx.array([[model.config.vocab_size - 1]]), model.make_cache())
    lead(model, lambda ids: mx.full(ids.shape, 2**31, mx.uint32), [].append)
    assert mx.array_equal(model(mx.array([[5]]), model.make_cache()), expected).item()


def test_a_rank_that_holds_too_little_says_so(folder: Path) -> None:
    model = load_inventory(take_inventory(folder), "float32")
    orders = [{"rows": [[1, None, 5]], "shape": [1, 1], "gone": []}]
    with pytest.raises(ApertusError, match="out of step with rank 0"):
        follow(model, CacheConfig(), lambda x: x, orders)
