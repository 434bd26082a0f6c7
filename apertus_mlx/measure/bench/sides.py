"""The sides of a comparison: a process each, which stays alive; one JSON line asks, one answers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass
from typing import Any

from apertus_mlx import errors
from apertus_mlx.errors import ApertusError, ResourceError
from apertus_mlx.measure.bench.workload import Task
from apertus_mlx.system.foreign_errors import explain


@dataclass(frozen=True, slots=True)
class Settings:
    """What a side is told when it starts; `form` are the fields of a `CacheConfig`."""

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


# A side with its model, and what times a task on it.
Loaded = tuple[Ready, Callable[[Task], float]]


class Side:
    """One side, seen from the process that compares.

    Raises:
        ApertusError: what the side raised, or that it ended without an answer.
    """

    def __init__(self, name: str, command: Sequence[str], settings: Settings) -> None:
        self.name = name
        self.peak_memory_bytes = 0
        self._stderr = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        started = time.perf_counter()
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
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
        return float(answer["seconds"])

    def close(self) -> None:
        """End the process, whatever it does."""
        self._process.kill()
        with suppress(OSError):
            self._process.communicate()
        self._stderr.close()

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        line = ""
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        if not line.endswith("\n"):
            raise self._ended()
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            kind: type[ApertusError] = getattr(errors, answer["error"])
            raise kind(answer["message"])
        return answer

    def _ended(self) -> ApertusError:
        code = self._process.wait()
        if code == -signal.SIGKILL:
            return ResourceError(f"the {self.name} side was killed: probably too little memory")
        self._stderr.seek(0)
        lines = self._stderr.read().split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "without a word")
        return ApertusError(f"the {self.name} side ended (code {code}): {last[:300]}")


def serve(open_side: Callable[[Settings], AbstractContextManager[Loaded]]) -> None:
    """Be a side: read settings, load with `open_side`, then time tasks until nobody asks more."""
    from apertus_mlx.backend.hardware import peak_bytes

    # Whatever a library prints must not get between the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def answer(value: dict[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    try:
        with open_side(Settings(**json.loads(sys.stdin.readline()))) as (ready, seconds):
            answer(asdict(ready))
            for line in sys.stdin:
                taken = seconds(Task(**json.loads(line)))
                answer({"seconds": taken, "peak_memory_bytes": peak_bytes(ready.on_gpu)})
    except Exception as error:
        known = explain(error)
        if known is None:
            raise
        # By the name in `errors` that it has or inherits.
        kind = next(base.__name__ for base in type(known).__mro__ if hasattr(errors, base.__name__))
        answer({"error": kind, "message": str(known)})
