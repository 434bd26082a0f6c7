"""The thread that computes: turns, ends, faults, bounds of queue and memory, sleep."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from apertus_mlx.cache import CacheConfig
from apertus_mlx.generation.cached_prefix import CachedPrefix
from apertus_mlx.generation.memory_plan import plan_memory
from apertus_mlx.generation.model_folder import LoadedModel
from apertus_mlx.generation.options import RunOptions, SamplingOptions
from apertus_mlx.generation.run import Generation
from apertus_mlx.server import jobs as jobs_module
from apertus_mlx.server.admission import MemoryBudget
from apertus_mlx.server.engine import Engine, EngineLimits
from apertus_mlx.server.errors import ApiError
from apertus_mlx.server.jobs import Ended, Event, Failed, Job, Task, Told
from tests.server.running import embedded

FOLDER = embedded().folder
LONG = {2: -100, 68: -100, 72: -100}  # no answer ends by itself


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return embedded()


class Box:
    """An outbox that a test reads."""

    def __init__(self, on_event: Callable[[Event], None] = lambda _: None) -> None:
        self.events: list[Event] = []
        self._ended = threading.Semaphore(0)
        self._on_event = on_event

    def put(self, event: Event) -> bool:
        self.events.append(event)
        self._on_event(event)
        if isinstance(event, Ended | Failed):
            self._ended.release()
        return True

    def wait(self) -> Event:
        assert self._ended.acquire(timeout=60)
        return self.events[-1]


def job(text: str = "The capital of France", box: Box | None = None, **fields: Any) -> Job:
    options = SamplingOptions(
        **{"temperature": 0, "max_tokens": 9, "logit_bias": LONG, **fields.pop("options", {})}
    )
    task = Task(FOLDER.encode_raw(text), options, streams=True, **fields)
    return Job(task, box or Box())


def engine(loaded: LoadedModel, settings: RunOptions | None = None, **limits: Any) -> Engine:
    plan = plan_memory(FOLDER.inventory, settings or RunOptions(), 512)
    budget = MemoryBudget(FOLDER.inventory, plan)
    made = Engine(FOLDER, lambda: loaded, budget, EngineLimits(**limits))
    made.start()
    while made.state == "loading":
        threading.Event().wait(0.01)
    return made


def box_of(one: Job) -> Box:
    assert isinstance(one.outbox, Box)
    return one.outbox


def tokens_of(one: Job) -> list[int]:
    last = box_of(one).events[-1]
    assert isinstance(last, Ended), last
    return last.answer.token_ids


@pytest.mark.parametrize("settings", [RunOptions(), RunOptions(kv_bits=4), RunOptions(max_kv=64)])
def test_neighbours_change_nothing(loaded: LoadedModel, settings: RunOptions) -> None:
    """Each of several that take turns says what it says alone, to the token."""
    texts = ["The capital of France", "Zurich is", "word " * 80, "In the year"]
    how = [{}, {"temperature": 2.0, "seed": 3}, {}, {"frequency_penalty": 1.0}]
    form = settings.form or CacheConfig()
    alone = []
    for text, options in zip(texts, how, strict=True):
        one = job(text, options=options)
        run = Generation(
            loaded, one.task.prompt, one.task.options, prefix=CachedPrefix(loaded.model, form)
        )
        list(run)
        alone.append(run.answer.token_ids)
    made = engine(loaded, replace(settings, prefill_step=32), idle_prefixes=0)
    try:
        several = [job(text, options=options) for text, options in zip(texts, how, strict=True)]
        made.submit(several)
        for one in several:
            box_of(one).wait()
        assert [tokens_of(one) for one in several] == alone
    finally:
        made.stop()


def test_all_get_their_turn(loaded: LoadedModel) -> None:
    """Between two tokens of one, each other that answers has one, or a chunk of a prompt."""
    order: list[int] = []
    boxes = [Box(lambda event, i=i: order.append(i) if isinstance(event, Told) else None)
             for i in range(3)]  # fmt: skip
    made = engine(loaded)
    try:
        made.submit([job(box=box) for box in boxes])
        for box in boxes:
            box.wait()
    finally:
        made.stop()
    middle = order[len(order) // 3 : 2 * len(order) // 3]
    assert all(set(middle[at : at + 4]) == {0, 1, 2} for at in range(0, len(middle) - 4))


def test_a_cancelled_job_ends_within_a_step(loaded: LoadedModel) -> None:
    held: list[Job] = []
    told: list[Event] = []

    def cancel_at_third(event: Event) -> None:
        told.append(event)
        if len(told) == 3:
            held[0].cancel()

    one = job(box=Box(cancel_at_third), options={"max_tokens": 400})
    held.append(one)
    made = engine(loaded)
    try:
        made.submit([one])
        after = job("Zurich is")
        made.submit([after])
        box_of(after).wait()
        assert len(told) <= 4 and one.finish == "cancelled"
        assert one not in made._running
    finally:
        made.stop()


def test_a_cancelled_job_leaves_the_queue(loaded: LoadedModel) -> None:
    made = engine(loaded, running=1, waiting=1)
    try:
        first, second = job(options={"max_tokens": 400}), job()
        made.submit([first])
        made.submit([second])
        with pytest.raises(ApiError) as refused:
            made.submit([job()])
        assert refused.value.status == 429 and "Retry-After" in refused.value.headers
        second.cancel()
        third = job()
        made.submit([third])
        first.cancel()
        box_of(third).wait()
        assert not box_of(second).events
    finally:
        made.stop()


@pytest.mark.parametrize("fault", [ValueError("x"), RuntimeError("[metal] out of memory")])
def test_a_fault_belongs_to_one_job(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    class Faulty(Generation):
        def __iter__(self) -> Any:
            for number, piece in enumerate(super().__iter__()):
                if number == 4 and self.options.seed == 13:
                    raise fault
                yield piece

    monkeypatch.setattr(jobs_module, "Generation", Faulty)
    made = engine(loaded)
    try:
        bad, good = job(options={"seed": 13}), job("Zurich is")
        made.submit([bad, good])
        failed = box_of(bad).wait()
        assert isinstance(failed, Failed) and failed.error.status in (500, 503)
        assert (failed.error.status == 503) == ("memory" in str(fault))
        assert isinstance(box_of(good).wait(), Ended) and made.healthy
        after = job()
        made.submit([after])
        assert isinstance(box_of(after).wait(), Ended)
    finally:
        made.stop()


def test_a_prompt_that_begins_alike_is_not_computed_again(loaded: LoadedModel) -> None:
    made = engine(loaded)
    try:
        for text, least in (("word " * 100, 0), ("word " * 100 + "Zurich", 100)):
            one = job(text)
            made.submit([one])
            last = box_of(one).wait()
            assert isinstance(last, Ended)
            assert last.cached_tokens >= least and bool(last.cached_tokens) == bool(least)
    finally:
        made.stop()


def test_memory_is_counted_before_a_job_begins(loaded: LoadedModel) -> None:
    one, other = job("word " * 100), job("other " * 100)
    plan = plan_memory(FOLDER.inventory, RunOptions(), 512)
    budget = MemoryBudget(FOLDER.inventory, plan)
    both = budget.total_bytes([one.task.positions, other.task.positions])
    assert both > budget.total_bytes([one.task.positions])
    tight = MemoryBudget(FOLDER.inventory, replace(plan, limit_bytes=both - 1))
    made = Engine(FOLDER, lambda: loaded, tight, EngineLimits())
    made.start()
    try:
        while made.state == "loading":
            threading.Event().wait(0.01)
        most = [0]
        sizes = made.metrics.sizes
        made.metrics.sizes = lambda running, waiting: (  # type: ignore[method-assign]
            most.append(running), sizes(running, waiting)
        )[1]  # fmt: skip
        made.submit([one, other])
        assert isinstance(box_of(one).wait(), Ended) and isinstance(box_of(other).wait(), Ended)
        assert max(most) == 1
        huge = job("word " * 100, options={"max_tokens": 10**6})
        with pytest.raises(ApiError) as refused:
            made.submit([huge])
        assert refused.value.status == 503
        assert refused.value.headers["x-should-retry"] == "false"
    finally:
        made.stop()


def test_it_sleeps_and_wakes(loaded: LoadedModel) -> None:
    loads = []
    plan = plan_memory(FOLDER.inventory, RunOptions(), 512)
    limits = EngineLimits(idle_unload_s=0.02)

    def load() -> LoadedModel:
        loads.append(1)
        return loaded

    made = Engine(FOLDER, load, MemoryBudget(FOLDER.inventory, plan), limits)
    made.start()
    try:
        while made.state != "sleeping":
            threading.Event().wait(0.01)
        assert made.healthy
        one = job()
        made.submit([one])
        assert isinstance(box_of(one).wait(), Ended) and len(loads) >= 2
    finally:
        made.stop()


def test_a_model_that_cannot_be_loaded_is_told() -> None:
    def load() -> LoadedModel:
        raise ValueError("damaged")

    plan = plan_memory(FOLDER.inventory, RunOptions(), 512)
    made = Engine(FOLDER, load, MemoryBudget(FOLDER.inventory, plan))
    told = threading.Event()
    made.on_failure = told.set
    made.start()
    assert told.wait(60)
    made.stop()
    assert made.state == "failed" and not made.healthy and str(made.failure) == "damaged"
    with pytest.raises(ApiError) as refused:
        made.submit([job()])
    assert refused.value.status == 503


def test_draining_ends_what_there_is_and_takes_no_more(loaded: LoadedModel) -> None:
    made = engine(loaded)
    one = job()
    made.submit([one])
    made.drain()
    with pytest.raises(ApiError) as refused:
        made.submit([job()])
    assert refused.value.status == 503
    assert isinstance(box_of(one).wait(), Ended)
    made.stop()
    assert made.state == "stopped"
