"""The one thread that computes: it takes jobs, gives each a step in turn, and never ends by one."""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

import mlx.core as mx

from apertus_mlx.backend.memory_limits import mlx_limits
from apertus_mlx.generation.cached_prefix import CachedPrefix
from apertus_mlx.generation.model_folder import LoadedModel, ModelFolder
from apertus_mlx.server.admission import MemoryBudget
from apertus_mlx.server.errors import ApiError, busy, in_engine
from apertus_mlx.server.jobs import Failed, Job
from apertus_mlx.server.metrics import Metrics
from apertus_mlx.server.prefix_pool import PrefixPool
from apertus_mlx.system.foreign_errors import out_of_memory

_log = logging.getLogger(__name__)

State = Literal["loading", "ready", "sleeping", "failed", "stopped"]
# Longest chunk of a prompt while other answers are being written.
SHARED_PREFILL_STEP = 128
# Without a step for so long, with work to do, the engine is not well.
STUCK_AFTER_S = 60.0


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """How much is done at once.

    Attributes:
        running: jobs whose caches exist at the same time.
        waiting: jobs that wait for that.
        idle_prefixes: caches that are kept for later prompts.
        idle_unload_s: seconds without work after which the weights are given back; None: never.
    """

    running: int = 4
    waiting: int = 32
    idle_prefixes: int = 8
    idle_unload_s: float | None = None


class Engine:
    """Runs jobs on a model that it loads itself, on a thread of its own.

    Attributes:
        state: `loading`, `ready`, `sleeping` (the weights are given back until a job comes),
            `failed` (the model could not be loaded) or `stopped`.
        failure: why the model could not be loaded.
        draining: whether no new job is taken.
        on_failure: is called when the model could not be loaded.
    """

    def __init__(
        self,
        folder: ModelFolder,
        load: Callable[[], LoadedModel],
        budget: MemoryBudget,
        limits: EngineLimits | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        """Prepare; `start` begins. `load` is called on the engine's thread."""
        self.folder = folder
        self.budget = budget
        self.limits = limits or EngineLimits()
        self.metrics = metrics or Metrics()
        self.state: State = "loading"
        self.failure: Exception | None = None
        self.draining = False
        self.on_failure: Callable[[], None] = lambda: None
        self._load_weights = load
        self._loaded: LoadedModel | None = None
        self._memory = ExitStack()
        self._pool = PrefixPool(self.limits.idle_prefixes)
        self._news = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []
        self._work: dict[Job, Iterator[None]] = {}
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
                raise busy(503, "the model could not be loaded", "failed", final=True)
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
            room = self.limits.running - len(self._running) + self.limits.waiting
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
            for job in [*self._waiting, *self._running]:
                job.outbox.put(Failed(error))
                job.cancel()
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
        stuck = not self._idle and time.monotonic() - self._tick > STUCK_AFTER_S
        return self.state in ("ready", "sleeping") and self._thread.is_alive() and not stuck

    def report(self) -> dict[str, object]:
        """What it is doing, in numbers."""
        running = list(self._running)
        return {
            "state": self.state,
            "healthy": self.healthy,
            "draining": self.draining,
            "running": len(running),
            "waiting": len(self._waiting),
            "most_running": self.limits.running,
            "most_waiting": self.limits.waiting,
            "running_positions": [job.task.positions for job in running],
            "idle_prefixes": len(self._pool),
            "prefix_hits": self._pool.hits,
        }

    # What follows runs on the engine's thread alone.

    def _run(self) -> None:
        try:
            self._load()
            while self._wait():
                self._turn()
        except Exception as error:  # noqa: BLE001 - nothing may end it silently
            _log.exception("the engine has ended")
            self.failure, self.state = error, "failed"
            self.on_failure()
        finally:
            self.end_all(busy(503, "the server is shutting down", "draining", final=True))
            for job in list(self._running):
                self._end(job)
            self._unload()
            if self.state != "failed":
                self.state = "stopped"

    def _load(self) -> None:
        plan = self.budget.plan
        with ExitStack() as limits:
            limits.enter_context(mlx_limits(plan.buffer_cache_bytes, plan.wired_bytes))
            self._loaded = self._load_weights()
            self._memory = limits.pop_all()
        self.state = "ready"
        self._tick = time.monotonic()

    def _unload(self) -> None:
        self._pool.clear()
        self._loaded = None
        gc.collect()
        self._memory.close()

    def _wait(self) -> bool:
        """Wait until there is something to do; returns False when it is time to end."""
        with self._news:
            self._idle = True
            while not self._stopping and not self._waiting and not self._running:
                patience = self.limits.idle_unload_s if self._loaded is not None else None
                if not self._news.wait(patience) and not self._waiting:
                    self._unload()
                    self.state = "sleeping"
            self._tick = time.monotonic()
            self._idle = False
            return not self._stopping

    def _turn(self) -> None:
        """Admit what fits, then a step of each answer and a chunk of one prompt."""
        self._admit()
        for job in [job for job in self._running if not job.reads]:
            self._step(job)
        reading = [job for job in self._running if job.reads]
        if reading:
            self._step(reading[0])
            if reading[0] in self._running:  # the next chunk is another's
                self._running.remove(reading[0])
                self._running.append(reading[0])
        self.metrics.sizes(len(self._running), len(self._waiting))
        self._tick = time.monotonic()

    def _admit(self) -> None:
        while len(self._running) < self.limits.running:
            with self._news:
                self._drop_cancelled()
                if not self._waiting:
                    return
                job = self._waiting[0]
            try:
                if self._loaded is None:
                    self._load()
                if not self._make_room(job):
                    return
                self._begin(job)
            except Exception as error:  # noqa: BLE001 - it is this job's end, not the engine's
                self._fail(job, error)
            finally:
                with self._news:
                    if job in self._work or job.cancelled:
                        self._waiting.remove(job)

    def _drop_cancelled(self) -> None:
        for job in [job for job in self._waiting if job.cancelled]:
            self._waiting.remove(job)
            self.metrics.ended(job, "cancelled")

    def _make_room(self, job: Job) -> bool:
        """Whether a job fits beside those that run, perhaps without some caches that are kept."""
        positions = [each.task.positions for each in [*self._running, job]]
        while not self.budget.fits(positions, self._pool.positions):
            if not self._pool.drop_oldest():
                return False
        return True

    def _begin(self, job: Job) -> None:
        assert self._loaded is not None
        job.begun_s = time.monotonic()
        prefix = self._pool.take(job.task.prompt, self.folder.tokenizer)
        if prefix is None:
            prefix = CachedPrefix(self._loaded.model, self.budget.plan.form)
        self._work[job] = job.steps(self._loaded, prefix, self._prefill_step)
        self._running.append(job)

    def _prefill_step(self) -> int:
        """How long a chunk of a prompt may be, so that others do not wait for long."""
        step = self.budget.plan.prefill_step
        return min(step, SHARED_PREFILL_STEP) if len(self._running) > 1 else step

    def _step(self, job: Job) -> None:
        try:
            if job.cancelled or next(self._work[job], self) is self:
                self._end(job)
        except Exception as error:  # noqa: BLE001 - it is this job's end, not the engine's
            self._fail(job, error)

    def _fail(self, job: Job, error: Exception) -> None:
        told = in_engine(error)
        if told.status == 500:
            _log.error("a request failed", exc_info=error)
            self.metrics.faults.inc()
        if out_of_memory(error):
            self._pool.clear()
            mx.clear_cache()
        job.finish = "error"
        job.outbox.put(Failed(told))
        job.cancel()
        self._end(job)

    def _end(self, job: Job) -> None:
        """Let go of a job, and keep its cache."""
        work = self._work.pop(job, None)
        try:
            if work is not None:
                work.close()  # type: ignore[attr-defined]
            if job.prefix is not None:
                self._pool.give(job.prefix)
        except Exception:  # noqa: BLE001 - the others go on
            _log.exception("a request could not be ended")
        job.prefix = None
        self.metrics.ended(job, job.finish)
        if job in self._running:
            self._running.remove(job)
