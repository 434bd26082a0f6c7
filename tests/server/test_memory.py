"""Memory: what does not fit waits or is refused, and what is kept makes way."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest

from apertus_mlx.cache import CacheConfig
from apertus_mlx.generation.cached_prefix import CachedPrefix
from apertus_mlx.generation.run import Generation
from apertus_mlx.server.admission import MemoryBudget
from apertus_mlx.server.engine import Engine
from apertus_mlx.server.errors import ApiError
from apertus_mlx.server.jobs import Ended, Job
from tests.server.engines import asked, engine, job, planned, tokens_of
from tests.server.running import embedded


class BytePositions(MemoryBudget):
    """A planner for which a position of an answer is a byte, and all else nothing."""

    def total_bytes(self, positions: Iterable[int]) -> int:
        return sum(positions)


def limited(budget: MemoryBudget, limit_bytes: int) -> MemoryBudget:
    return replace(budget, plan=replace(budget.plan, limit_bytes=limit_bytes))


def most_at_once(made: Engine, *jobs: Job) -> int:
    """The most answers at a time."""
    seen = [0]
    sizes = made.metrics.sizes
    made.metrics.sizes = lambda running, waiting: (  # type: ignore[method-assign]
        seen.append(running), sizes(running, waiting)
    )[1]  # fmt: skip
    assert all(isinstance(each, Ended) for each in asked(made, *jobs))
    return max(seen)


@pytest.mark.parametrize(("limit", "most"), [(18, 1), (36, 2)])
def test_answers_begin_as_far_as_they_fit(limit: int, most: int) -> None:
    plan = planned()
    budget = limited(BytePositions(plan.inventory, plan.plan), limit)
    made = engine(embedded(), budget=budget)
    try:
        jobs = [job(f"{name} is", options={"max_tokens": 12}) for name in ("Zurich", "Bern", "It")]
        assert all(12 < each.task.positions <= 18 for each in jobs)
        assert most_at_once(made, *jobs) == most
    finally:
        made.stop()


def test_what_never_fits_is_refused() -> None:
    plan = planned()
    made = engine(embedded(), budget=limited(BytePositions(plan.inventory, plan.plan), 20))
    try:
        with pytest.raises(ApiError) as refused:
            made.submit([job(), job(options={"max_tokens": 20})])
        assert refused.value.status == 503 and "Retry-After" in refused.value.headers
        assert refused.value.headers["x-should-retry"] == "false"
        assert isinstance(asked(made, job())[0], Ended)
    finally:
        made.stop()


def test_the_real_planner_counts_each_cache() -> None:
    one, other = (job(word * 30, options={"max_tokens": 3}) for word in ("word ", "other "))
    budget = planned()
    both = budget.total_bytes([one.task.positions, other.task.positions])
    assert both > budget.total_bytes([one.task.positions])
    for limit, most in ((both, 2), (both - 1, 1)):
        made = engine(embedded(), budget=limited(budget, limit))
        try:
            again = [Job(each.task, job().outbox) for each in (one, other)]
            assert most_at_once(made, *again) == most
        finally:
            made.stop()


def test_a_conversation_goes_on_where_memory_holds_it_once() -> None:
    """Its cache is handed on where there is no room for a copy."""
    loaded, first = embedded(), job("word " * 40)
    second = job("word " * 40 + "Zurich")
    budget = planned()
    tight = budget.total_bytes([second.task.positions]) + 1
    made = engine(loaded, budget=limited(budget, tight))
    try:
        assert isinstance(asked(made, first)[0], Ended)
        assert made.report()["idle_prefixes"] == 1
        (last,) = asked(made, second)
        assert isinstance(last, Ended) and last.cached_tokens >= 40
        assert made.report()["prefix_hits"] == 1
    finally:
        made.stop()
    prefix = CachedPrefix(loaded.model, CacheConfig())
    run = Generation(loaded, second.task.prompt, second.task.options, prefix=prefix)
    list(run)
    assert tokens_of(second) == run.answer.token_ids
