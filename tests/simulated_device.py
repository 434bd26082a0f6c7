"""A device and kernels that are faulty or slow on demand, in this process and in another."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from apertus_mlx.backend.metal import verdict
from apertus_mlx.backend.metal.kernel import Exact, KernelText, Launch, Run
from apertus_mlx.backend.metal.verdict import Machine, Verdict
from apertus_mlx.measure.doctor.attended import AttendedDevice
from apertus_mlx.measure.doctor.child import serve
from apertus_mlx.measure.doctor.consult import consult, keys_of
from apertus_mlx.measure.doctor.device import Agreement, Attempt, UnfitError
from apertus_mlx.measure.doctor.measure import measure
from apertus_mlx.measure.doctor.race import ROUNDS

MACHINE = Machine("Apple M4 Pro", "macOS 26.2 (25C56)", "0.32.4", "0.1.0")
# Nothing simulated takes as long, however busy the machine; what hangs is ended by a shorter one.
PATIENCE_S, HANG_S = 60.0, 4.0
AGREED = Agreement(64, 64, 1e-6, 1e-9, 1e-4)


@dataclass(frozen=True, slots=True)
class Double:
    """A kernel that doubles; `key` tells the device how well."""

    place: str = "double"
    variant: str = "plain"
    source: str = "y[thread_position_in_grid.x] = 2 * x[thread_position_in_grid.x];"
    tolerance: float = 1e-6

    @property
    def key(self) -> str:
        return f"{self.place}-{self.variant}"

    def text(self) -> KernelText:
        return KernelText("double", ("x",), ("y",), self.source, "")

    def launch(self, inputs: Sequence[mx.array]) -> Launch:
        return Launch((64, 1, 1), (64, 1, 1), ((64,),), (mx.float32,))

    def trial(self, seed: int) -> list[mx.array]:
        return [mx.random.normal((64,), key=mx.random.key(seed))]

    def plain(self, inputs: Sequence[mx.array]) -> list[mx.array]:
        return [2 * inputs[0]]

    def exact(self, inputs: Sequence[mx.array]) -> list[Exact]:
        return [2 * np.array(inputs[0], np.float64)]


class Unlaunched(Double):
    """A kernel that does not know its own outputs."""

    def launch(self, inputs: Sequence[mx.array]) -> Launch:
        raise ValueError("no such shape")


def broken(variant: str) -> Run:
    """What a kernel of this variant computes."""
    calls = iter(range(1000))

    def run(inputs: Sequence[mx.array]) -> list[mx.array]:
        x = inputs[0]
        match variant:
            case "wrong":
                return [3 * x]
            case "slightly wrong":
                return [2 * x * (1 + 3e-6)]
            case "unstable":
                return [2 * x * (1 + 2e-7 * (next(calls) % 7 == 5))]
            case "not a number":
                return [mx.where(mx.arange(64) == 9, mx.array(float("nan")), 2 * x)]
            case "misshapen":
                return [2 * x[None]]
            case "refused":
                raise RuntimeError("[metal::Device] Unable to build metal library from source\n...")
            case "aborts":
                os.abort()
            case "hangs":
                threading.Event().wait()
            case "leaves":
                print("out of cheese", file=sys.stderr)
                os._exit(3)
        return [2 * x]

    return run


@dataclass
class Simulated:
    """A device in this process; times are ratios to the plain form, which takes a second."""

    # Key -> a ratio for each round; 0.5 in all of them where it is missing.
    ratios: Mapping[str, Sequence[float]] = field(default_factory=dict)
    # Places whose kernel slows down or ends the whole model, and the agreement of the others.
    slowing: frozenset[str] = frozenset()
    crashing: frozenset[str] = frozenset()
    found: Agreement = AGREED
    found_compiled: Agreement = AGREED
    # Time of a compiled step over that of another.
    compiled: float = 0.9
    calls: dict[str, int] = field(default_factory=dict)
    models: list[set[str]] = field(default_factory=list)

    def attempt(self, kernel: Any) -> Attempt:
        return measure(kernel, broken(kernel.variant))

    def seconds(self, kernel: Any, fused: bool) -> float:
        if not fused:
            return 1.0
        call = self.calls[kernel.key] = self.calls.get(kernel.key, -1) + 1
        # The first call warms up; each round has two.
        ratios = self.ratios.get(kernel.key, [0.5] * ROUNDS)
        return ratios[max(0, call - 1) // 2]

    def agreement(self, kernels: Mapping[str, Any], compiled: bool = False) -> Agreement:
        if compiled:
            return self.found_compiled
        self.models.append({kernel.key for kernel in kernels.values()})
        if self.crashing & kernels.keys():
            raise UnfitError("ends its process (SIGABRT)")
        return self.found

    def step_seconds(self, kernels: Mapping[str, Any], compiled: bool = False) -> float:
        plain = 1.0 - 0.1 * len(kernels) + 2.0 * len(self.slowing & kernels.keys())
        return plain * (self.compiled if compiled else 1.0)


def be_child(names: str, descriptor: str) -> None:
    """The other side of `attended`: kernels of these variants, each in a place of its own."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    serve(Connection(int(descriptor)), Simulated(), singles(*json.loads(names)))


def accepted(machine: Machine, kernels: Sequence[Any]) -> Mapping[str, Any]:
    return verdict.find_accepted(machine, kernels).kernels


def singles(*variants: str) -> tuple[Double, ...]:
    return tuple(Double(f"place {index}", variant) for index, variant in enumerate(variants))


def attended(*variants: str, limit_s: float = PATIENCE_S) -> AttendedDevice:
    paths = [str(Path(__file__).parents[1])]
    code = f"import sys; sys.path[:0] = {paths}; from tests.simulated_device import be_child"
    code += "; be_child(*sys.argv[1:])"
    command = [sys.executable, "-c", code, json.dumps(variants)]
    return AttendedDevice(command, limit_s, PATIENCE_S)


def make_verdict(kernels: Sequence[Double], tuned: bool = True, **changes: Any) -> Verdict:
    done = consult(Simulated(), kernels, with_times=tuned)
    found = Verdict(
        MACHINE, verdict.text_hash(kernels), "m", "2026-11-22", tuned, keys_of(done.accepted),
        done.reasons, None,
    )  # fmt: skip
    return replace(found, **changes)


def run_doctor(*arguments: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "apertus_mlx", "doctor", *arguments],
        capture_output=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        timeout=120,
        check=False,
    )
