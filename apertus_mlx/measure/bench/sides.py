"""The sides of a comparison: a process each, which stays alive."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from apertus_mlx import errors
from apertus_mlx.errors import ApertusError, ResourceError
from apertus_mlx.measure.bench.workload import Task
from apertus_mlx.measure.other_process import EndedError, OtherProcess, send
from apertus_mlx.system.foreign_errors import explain


@dataclass(frozen=True, slots=True)
class Settings:
    """What a side is told when it starts.

    `form` are the fields of a `CacheConfig`, `draft` is a folder or `lookup`.
    """

    directory: str
    vocab_size: int
    new_tokens: int
    seed: int
    dtype: str | None
    compute: str
    precision: str
    form: dict[str, Any]
    prefill_step: int
    buffer_cache_bytes: int
    wired_bytes: int
    draft: str | None = None
    draft_vocab: int | None = None


@dataclass(frozen=True, slots=True)
class Ready:
    """What a side says once its model is loaded.

    `on_gpu`: whether MLX's GPU computes; `kernels` are those of this package in use, `number_bytes`
    are those of a cached number.
    """

    version: str
    backend: str
    on_gpu: bool
    kernels: list[str]
    dtype: str
    cache: str
    number_bytes: int
    prefill_step: int
    load_s: float


class Loaded(NamedTuple):
    """A side with its model, what times a task on it, and what its draft was good for so far.

    `peak_bytes`: the most memory that it has held; None: as MLX or the system says.
    """

    ready: Ready
    seconds: Callable[[Task], float]
    speculation: Callable[[], dict[str, object] | None] = lambda: None
    peak_bytes: Callable[[], int] | None = None


class Side:
    """One side, seen from the process that compares.

    Raises:
        ApertusError: what the side raised, or that it ended without an answer.
    """

    def __init__(self, name: str, command: Sequence[str], settings: Settings) -> None:
        self.name = name
        self.peak_memory_bytes = 0
        self.speculation: dict[str, object] | None = None
        started = time.perf_counter()
        self._process = OtherProcess(command, {"HF_HUB_OFFLINE": "1"})
        try:
            self.ready = Ready(**self._ask(asdict(settings)))
        except BaseException:
            self.close()
            raise
        self.start_s = time.perf_counter() - started

    def seconds(self, task: Task) -> float:
        """Seconds that `task` takes on this side."""
        answer = self._ask(asdict(task))
        self.peak_memory_bytes = answer["peak_memory_bytes"]
        self.speculation = answer["speculation"]
        return float(answer["seconds"])

    def close(self) -> None:
        """End the process, whatever it does."""
        self._process.end()

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        try:
            answer = self._process.ask(question)
        except EndedError as error:
            if error.killed:
                raise ResourceError(
                    f"the {self.name} side was killed: probably too little memory"
                ) from None
            raise ApertusError(f"the {self.name} side {error}") from None
        if "error" in answer:
            kind: type[ApertusError] = getattr(errors, answer["error"])
            raise kind(answer["message"])
        return answer


def serve(open_side: Callable[[Settings], AbstractContextManager[Loaded]]) -> None:
    """Be a side: read settings, load with `open_side`, then time tasks until nobody asks more."""
    from apertus_mlx.backend.hardware import peak_bytes

    connection = Connection(int(sys.argv[-1]))
    try:
        with open_side(Settings(**json.loads(connection.recv_bytes()))) as loaded:
            send(connection, asdict(loaded.ready))
            while True:
                taken = loaded.seconds(Task(**json.loads(connection.recv_bytes())))
                own = loaded.peak_bytes
                peak = peak_bytes(loaded.ready.on_gpu) if own is None else own()
                told = {"peak_memory_bytes": peak, "speculation": loaded.speculation()}
                send(connection, {"seconds": taken, **told})
    except EOFError:
        return
    except Exception as error:
        known = explain(error)
        if known is None:
            raise
        # By the name in `errors` that it has or inherits.
        kind = next(base.__name__ for base in type(known).__mro__ if hasattr(errors, base.__name__))
        send(connection, {"error": kind, "message": str(known)})
