"""What each of several machines gets of a model, and the settings that suit all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from apertus_mlx.cache import CacheConfig
from apertus_mlx.checkpoint.inventory import Inventory, Part, take_inventory
from apertus_mlx.errors import UsageError
from apertus_mlx.generation import memory_plan, own_part
from apertus_mlx.generation.options import RunOptions
from apertus_mlx.memory.footprint import kv_bytes
from tests.builders import config_4x, write_checkpoint


@dataclass
class Others:
    """This process among others, of which it is known what they say."""

    rank: int
    size: int
    numbers: tuple[int, ...] = ()
    refuse: Callable[[int], bool] = lambda _: False
    asked: int = 0

    def gathered(self, number: int) -> list[int]:
        found = list(self.numbers)
        found.insert(self.rank, number)
        return found

    def any(self, word: bool) -> bool:
        self.asked += 1
        return word or self.refuse(self.asked)

    def require_alike(self, facts: object) -> None:
        assert facts


@pytest.fixture
def whole(tmp_path: Path) -> Inventory:
    return take_inventory(write_checkpoint(tmp_path, config_4x(num_hidden_layers=6, head_dim=64)))


@pytest.fixture
def among(monkeypatch: pytest.MonkeyPatch) -> Callable[[Others], None]:
    def set_(others: Others) -> None:
        for module in (memory_plan, own_part):
            monkeypatch.setattr(module, "joined", lambda: others)

    return set_


def test_a_part_of_each_kind(whole: Inventory, among: Callable[[Others], None]) -> None:
    options = RunOptions(pipeline=True, memory_limit="20MB", compute="mlx")
    with pytest.raises(UsageError, match="--pipeline: splits a model over the machines"):
        own_part.own_part(whole, options)
    assert own_part.own_part(whole, RunOptions()) is whole
    among(Others(1, 2, (20,)))
    assert own_part.own_part(whole, RunOptions()).part == Part(1, 2)
    # As much memory here as there: three layers each; much more there: one here.
    assert own_part.own_part(whole, options).part == Part(1, 2, range(3, 6))
    among(Others(1, 2, (900,)))
    assert own_part.own_part(whole, options).part == Part(1, 2, range(5, 6))


def test_settings_are_those_that_suit_all(
    whole: Inventory, among: Callable[[Others], None]
) -> None:
    others = Others(0, 2)
    among(others)
    part = own_part.own_part(whole, RunOptions())
    options = RunOptions(compute="mlx", memory_limit="1GB")
    plan = memory_plan.plan_memory(part, options, 200)
    assert (plan.form, plan.prefill_step) == (CacheConfig(), 512)
    # The other rank has room for no full cache: 512, 256 and 128 with it are refused.
    others.asked, others.refuse = 0, lambda asked: asked <= 3
    plan = memory_plan.plan_memory(part, options, 200)
    assert (plan.form, plan.prefill_step) == (CacheConfig(8, 8), 512)
    others.refuse = lambda _: True
    with pytest.raises(UsageError, match="no settings for the cache suit all ranks"):
        memory_plan.plan_memory(part, options, 200)


def test_the_rank_with_the_least_room_says_how_much_there_is(
    whole: Inventory, among: Callable[[Others], None]
) -> None:
    others = Others(0, 2, (1000,))
    among(others)
    part = own_part.own_part(whole, RunOptions())
    plan = memory_plan.plan_memory(part, RunOptions(compute="mlx", memory_limit="1GB"), 200)
    least = own_part.common_room(part, plan)
    room = least.limit_bytes - least.footprint.total_bytes
    assert room == pytest.approx(kv_bytes(part.config, plan.form, 1024, 4) * 1000 / 1024)
    others.numbers = (10**9,)
    assert own_part.common_room(part, plan).limit_bytes == pytest.approx(10**9, rel=1e-5)
