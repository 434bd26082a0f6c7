"""Engines and their jobs without HTTP."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from apertus_mlx.generation.memory_plan import plan_memory
from apertus_mlx.generation.model_folder import LoadedModel
from apertus_mlx.generation.options import RunOptions, SamplingOptions
from apertus_mlx.server.admission import MemoryBudget
from apertus_mlx.server.engine import Engine, EngineLimits
from apertus_mlx.server.jobs import Ended, Event, Failed, Job, Task
from tests.server.running import embedded

FOLDER = embedded().folder
LONG = {2: -100, 68: -100, 72: -100}  # no answer ends by itself


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


def planned(settings: RunOptions | None = None) -> MemoryBudget:
    plan = plan_memory(FOLDER.inventory, settings or RunOptions(), 512)
    return MemoryBudget(FOLDER.inventory, plan)


def engine(
    loaded: LoadedModel,
    settings: RunOptions | None = None,
    budget: MemoryBudget | None = None,
    **limits: Any,
) -> Engine:
    made = Engine(FOLDER, lambda: loaded, budget or planned(settings), EngineLimits(**limits))
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


def asked(made: Engine, *jobs: Job) -> list[Event]:
    """What jobs of one request tell at last."""
    made.submit(jobs)
    return [box_of(one).wait() for one in jobs]
