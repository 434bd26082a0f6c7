"""The one thread that computes: it answers many jobs in one batch, and never ends by one."""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

from apertus_mlx.backend.memory_limits import mlx_limits
from apertus_mlx.generation.model_folder import LoadedModel, ModelFolder
from apertus_mlx.server.admission import MemoryBudget
from apertus_mlx.server.errors import ApiError, busy, in_engine
from apertus_mlx.server.jobs import Job
from apertus_mlx.server.metrics import Metrics
from apertus_mlx.server.running import Running, fail
from apertus_mlx.server.slots import SlotFolder

_log = logging.getLogger(__name__)

State = Literal["loading", "ready", "sleeping", "failed", "stopped"]
# Without a step for so long, with work to do, the engine is not well.
STUCK_AFTER_S = 60.0


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """How much is done at once.

    Attributes:
        running: answers that are written, or whose prompt is read, at the same time.
        waiting: jobs that wait for that.
        idle_prefixes: caches that are kept for later prompts, where memory allows it.
        idle_unload_s: seconds without work after which the weights are given back; None: never.
    """

    running: int = 4
    waiting: int = 32
    idle_prefixes: int = 16
    idle_unload_s: float | None = None


class Engine:
    """Runs jobs on a model that it loads itself, on a thread of its own.

    Attributes:
        state: `loading`, `ready`, `sleeping` (the weights are given back until a job comes),
            `failed` (see `failure`) or `stopped`.
        failure: why the model could not be loaded, or cannot be used any more.
        draining: whether no new job is taken.
        on_failure: is called when it has failed.
    """

    def __init__(
        self,
        folder: ModelFolder,
        load: Callable[[], LoadedModel],
        budget: MemoryBudget,
        limits: EngineLimits | None = None,
        metrics: Metrics | None = None,
        slots: SlotFolder | None = None,
    ) -> None:
        """Prepare; `start` begins. `load` is called on the engine's thread."""
        self._slots = slots
        self.folder = folder
        self.budget = budget
        self.limits = limits or EngineLimits()
        self.metrics = metrics or Metrics()
        self.state: State = "loading"
        self.failure: Exception | None = None
        self.draining = False
        self.on_failure: Callable[[], None] = lambda: None
        self._load_weights = load
        self._running: Running | None = None
        self._memory = ExitStack()
        self._news = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._stopping = False
        self._idle = False
        self._tick = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Begin to load, then to work."""
        self._thread.start()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Take all these jobs, or none.

        Raises:
            ApiError: 503 not ready, draining or no memory; 429 too many wait already.
        """
        with self._news:
            if self.draining or self._stopping:
                raise busy(503, "the server is shutting down", "draining", final=True)
            if self.state == "loading":
                raise busy(503, "the model is being loaded", "loading")
            if self.state not in ("ready", "sleeping"):
                raise busy(503, "the engine has failed", "failed", final=True)
            for job in jobs:
                if not self.budget.fits([job.task.positions]):
                    raise busy(
                        503,
                        f"{job.task.positions} tokens of prompt and answer do not fit this "
                        "machine's memory; ask for a smaller max_tokens, or shorten the prompt",
                        "no_memory",
                        final=True,
                    )
            waiting = sum(not job.cancelled for job in self._waiting)
            room = self.limits.running - len(self._running or ()) + self.limits.waiting
            if waiting + len(jobs) > room:
                raise busy(429, "too many requests wait already", "queue_full")
            self._waiting.extend(jobs)
            self._news.notify()

    def wake(self) -> None:
        """Have it look for cancelled jobs that wait."""
        with self._news:
            self._news.notify()

    def drain(self) -> None:
        """Take no job any more; those there are go on."""
        self.draining = True

    def end_all(self, error: ApiError) -> None:
        """End all jobs with an error."""
        with self._news:
            running = () if self._running is None else self._running.jobs
            for job in dict.fromkeys([*self._waiting, *running]):
                job.fail(error)
            self._news.notify()

    def stop(self) -> None:
        """End all work and the thread, and give back the memory; waits for that."""
        with self._news:
            self._stopping = True
            self._news.notify()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def healthy(self) -> bool:
        """Whether it does what there is to do."""
        # Waking from sleep may take longer: a large model is loaded.
        working = self.state == "ready" and not self._idle
        stuck = working and time.monotonic() - self._tick > STUCK_AFTER_S
        return self.state in ("ready", "sleeping") and self._thread.is_alive() and not stuck

    def report(self) -> dict[str, object]:
        """What it is doing, in numbers."""
        running = self._running
        return {
            "state": self.state,
            "healthy": self.healthy,
            "draining": self.draining,
            "running": len(running or ()),
            "waiting": len(self._waiting),
            "most_running": self.limits.running,
            "most_waiting": self.limits.waiting,
            "running_positions": [] if running is None else running.positions,
            "idle_prefixes": 0 if running is None else len(running.prefixes),
            "prefix_bytes": 0 if running is None else running.prefixes.nbytes,
            "prefix_hits": 0 if running is None else running.prefixes.hits,
            "slots": 0 if running is None else len(running.prefixes.names),
            "draft": None if running is None else running.drafts,
        }

    # What follows runs on the engine's thread alone.

    def _run(self) -> None:
        try:
            self._load()
            while self.failure is None and self._wait():
                self._turn()
        except Exception as error:  # noqa: BLE001 - nothing may end it silently
            self.failure = error
        finally:
            told = busy(503, "the server is shutting down", "draining", final=True)
            if self.failure is not None:
                self.state, told = "failed", in_engine(self.failure)
            self.end_all(told)
            self._first()
            self._unload()
            if self.failure is None:
                self.state = "stopped"
            else:
                self.on_failure()

    def _load(self) -> Running:
        plan = self.budget.plan
        with ExitStack() as limits:
            limits.enter_context(mlx_limits(plan.buffer_cache_bytes, plan.wired_bytes))
            running = Running(
                self._load_weights(),
                self.budget,
                self.metrics,
                self.limits.idle_prefixes,
                self._slots,
            )
            self._memory = limits.pop_all()
        self._running = running
        self._tick = time.monotonic()
        self.state = "ready"
        return running

    def _unload(self) -> None:
        if self._running is not None:
            self._running.leave_cancelled()
            if self.failure is None:
                self._running.save_slots()
        self._running = None
        gc.collect()
        self._memory.close()

    def _wait(self) -> bool:
        """Wait until there is something to do; returns False when it is time to end."""
        with self._news:
            self._idle = True
            while not self._stopping and not self._waiting and not self._running:
                patience = self.limits.idle_unload_s if self._running is not None else None
                if not self._news.wait(patience) and not self._waiting:
                    self._unload()
                    self.state = "sleeping"
            self._tick = time.monotonic()
            self._idle = False
            return not self._stopping

    def _turn(self) -> None:
        self._admit()
        if self._running is not None:
            self._running.turn()
            if not self._running and not self._waiting:
                self._running.save_slots()
        self.metrics.sizes(len(self._running or ()), len(self._waiting))
        self._tick = time.monotonic()

    def _admit(self) -> None:
        """Begin answers, in the order in which they were asked for, as long as they fit."""
        while (job := self._first()) is not None:
            try:
                running = self._load() if self._running is None else self._running
                if len(running) >= self.limits.running or not running.has_room(job):
                    return
                running.begin(job)
            except Exception as error:  # noqa: BLE001 - it is this job's end, not the engine's
                fail(job, error, self.metrics)

    def _first(self) -> Job | None:
        """The first job that waits; those that wait no longer leave."""
        with self._news:
            for job in [job for job in self._waiting if job.cancelled or job.has_begun]:
                self._waiting.remove(job)
                if job.close(job.task.choices - job.begun):
                    self.metrics.ended(job, job.finish)
            return self._waiting[0] if self._waiting else None
