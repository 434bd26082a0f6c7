"""The thread that computes: turns, ends, faults, bounds of queue and memory, sleep."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest

from apertus_mlx.cache import CacheConfig
from apertus_mlx.generation import batch as batch_module
from apertus_mlx.generation.cached_prefix import CachedPrefix
from apertus_mlx.generation.memory_plan import plan_memory
from apertus_mlx.generation.model_folder import LoadedModel
from apertus_mlx.generation.options import RunOptions
from apertus_mlx.generation.run import Generation
from apertus_mlx.server import engine as engine_module
from apertus_mlx.server.admission import MemoryBudget
from apertus_mlx.server.engine import Engine, EngineLimits
from apertus_mlx.server.errors import ApiError
from apertus_mlx.server.jobs import Ended, Event, Job, Told
from tests.server.engines import FOLDER, Box, asked, box_of, engine, job, tokens_of
from tests.server.running import embedded


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return embedded()


@pytest.mark.parametrize("settings", [RunOptions(kv_bits=4), RunOptions(max_kv=32)])
def test_neighbours_change_nothing(loaded: LoadedModel, settings: RunOptions) -> None:
    """Each of several that take turns says what it says alone, to the token."""
    texts = ["The capital of France", "Zurich is", "word " * 40, "In the year"]
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
        assert made._running is not None and one not in made._running.jobs
    finally:
        made.stop()


def test_a_cancelled_job_reads_no_other_chunk(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, read = job("word " * 200), [0]
    read_chunk = batch_module.read_chunk

    def reading(*given: Any) -> Any:
        read[0] += 1
        if read[0] == 2:
            one.cancel()
        return read_chunk(*given)

    monkeypatch.setattr(batch_module, "read_chunk", reading)
    made = engine(loaded, RunOptions(prefill_step=32))
    try:
        made.submit([one])
        while one.left:
            threading.Event().wait(0.005)
        assert read == [2] and one.finish == "cancelled" and not box_of(one).events
        # What it has read is kept.
        (last,) = asked(made, job("word " * 200))
        assert isinstance(last, Ended) and last.cached_tokens == 64
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


def test_a_load_that_takes_long_is_not_stuck(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large model may take a minute to wake; a supervisor would end it again and again."""
    plan = plan_memory(FOLDER.inventory, RunOptions(), 512)
    waking, go_on = threading.Event(), threading.Event()

    def load() -> LoadedModel:
        if made.state == "sleeping":
            waking.set()
            assert go_on.wait(60)
        return loaded

    limits = EngineLimits(idle_unload_s=0.02)
    made = Engine(FOLDER, load, MemoryBudget(FOLDER.inventory, plan), limits)
    made.start()
    try:
        while made.state != "sleeping":
            threading.Event().wait(0.01)
        one = job()
        made.submit([one])
        assert waking.wait(60)
        monkeypatch.setattr(engine_module, "STUCK_AFTER_S", -1)
        assert made.healthy
        go_on.set()
        assert isinstance(box_of(one).wait(), Ended)
    finally:
        go_on.set()
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
