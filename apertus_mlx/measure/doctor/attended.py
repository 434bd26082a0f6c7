"""A device in a process of its own, attended: what kills it is named, and it is started anew."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from apertus_mlx.backend.metal.kernel import Kernel
from apertus_mlx.errors import RejectedError, ResourceError
from apertus_mlx.measure.doctor.device import Agreement, Attempt, Device, UnfitError
from apertus_mlx.measure.other_process import EndedError, OtherProcess
from apertus_mlx.system.foreign_errors import out_of_memory

# Most that one answer may take: about a kernel, and about the whole model, which is loaded first.
KERNEL_LIMIT_S, MODEL_LIMIT_S = 180.0, 900.0


def child_command(folder: Path, dtype: str) -> list[str]:
    """What to start for the model in `folder`; with -P no module of the current folder is run."""
    return [sys.executable, "-P", "-m", "apertus_mlx.measure.doctor.child", str(folder), dtype]


class AttendedDevice(Device):
    """A `Device` that outlives kernels that crash or hang.

    Args:
        command: starts the other side; see `OtherProcess`.
        kernel_limit_s: most that an answer about a kernel may take.
        model_limit_s: most that starting, and an answer about the whole model, may take.

    Raises:
        RejectedError: the process does not start; that is the machine's or MLX's fault, no
            kernel's.
        ResourceError: the system killed it, or gave it too little memory.
    """

    def __init__(
        self,
        command: Sequence[str],
        kernel_limit_s: float = KERNEL_LIMIT_S,
        model_limit_s: float = MODEL_LIMIT_S,
    ) -> None:
        self._command = command
        self._kernel_limit_s, self._model_limit_s = kernel_limit_s, model_limit_s
        self._process: OtherProcess | None = None

    def __enter__(self) -> AttendedDevice:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.end()

    def attempt(self, kernel: Kernel) -> Attempt:
        return Attempt(**self._ask("attempt", [kernel], self._kernel_limit_s))

    def seconds(self, kernel: Kernel, fused: bool) -> float:
        return float(self._ask("seconds", [kernel], self._kernel_limit_s, fused))

    def agreement(self, kernels: Mapping[str, Kernel], compiled: bool = False) -> Agreement:
        found = self._ask("agreement", kernels.values(), self._model_limit_s, compiled)
        return Agreement(**found)

    def step_seconds(self, kernels: Mapping[str, Kernel], compiled: bool = False) -> float:
        return float(self._ask("step_seconds", kernels.values(), self._model_limit_s, compiled))

    def _ask(self, call: str, kernels: Iterable[Kernel], limit_s: float, *flags: bool) -> Any:
        process = self._process = self._process or self._start()
        question = {"call": call, "kernels": [kernel.key for kernel in kernels], "flags": flags}
        try:
            reply = process.ask(question, limit_s)
        except EndedError as error:
            self._process = None
            raise UnfitError(f"its process {error}") from None
        if "unfit" in reply:
            raise UnfitError(reply["unfit"])
        return reply["value"]

    def _start(self) -> OtherProcess:
        process = OtherProcess(self._command, {})
        try:
            process.ask({}, self._model_limit_s)
        except EndedError as error:
            kind = ResourceError if error.killed or out_of_memory(error) else RejectedError
            raise kind(f"the process that tries the kernels does not start: {error}") from None
        return process
