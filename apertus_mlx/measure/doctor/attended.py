"""A device in a process of its own, attended: what kills it is named, and it is started anew."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

from apertus_mlx.backend.metal.kernel import Kernel
from apertus_mlx.errors import RejectedError, ResourceError
from apertus_mlx.measure.doctor.device import Agreement, Attempt, Device, UnfitError
from apertus_mlx.system.foreign_errors import out_of_memory

# Most that one answer may take: about a kernel, and about the whole model, which is loaded first.
KERNEL_LIMIT_S, MODEL_LIMIT_S = 180.0, 900.0


def child_command(folder: Path, dtype: str) -> list[str]:
    """What to start for the model in `folder`; with -P no module of the current folder is run."""
    return [
        sys.executable,
        "-P",
        "-m",
        "apertus_mlx.measure.doctor.child",
        str(folder),
        dtype,
    ]


class AttendedDevice(Device):
    """A `Device` that outlives kernels that crash or hang.

    Args:
        command: starts the other side; the number of a file to talk over is appended.
        kernel_limit_s: most that an answer about a kernel may take.
        model_limit_s: most that starting, and an answer about the whole model, may take.
    """

    def __init__(
        self,
        command: Sequence[str],
        kernel_limit_s: float = KERNEL_LIMIT_S,
        model_limit_s: float = MODEL_LIMIT_S,
    ) -> None:
        self._command = command
        self._kernel_limit_s, self._model_limit_s = kernel_limit_s, model_limit_s
        self._child: _Child | None = None

    def __enter__(self) -> AttendedDevice:
        return self

    def __exit__(self, *_: object) -> None:
        if self._child is not None:
            self._child.end()

    def attempt(self, kernel: Kernel) -> Attempt:
        return Attempt(**self._ask("attempt", [kernel], self._kernel_limit_s))

    def seconds(self, kernel: Kernel, fused: bool) -> float:
        return float(self._ask("fused" if fused else "plain", [kernel], self._kernel_limit_s))

    def agreement(self, kernels: Mapping[str, Kernel], compiled: bool = False) -> Agreement:
        call = "compiled agreement" if compiled else "agreement"
        return Agreement(**self._ask(call, kernels.values(), self._model_limit_s))

    def step_seconds(self, kernels: Mapping[str, Kernel], compiled: bool = False) -> float:
        call = "compiled step" if compiled else "step"
        return float(self._ask(call, kernels.values(), self._model_limit_s))

    def _ask(self, call: str, kernels: Any, limit_s: float) -> Any:
        if self._child is None:
            self._child = _start(self._command, self._model_limit_s)
        try:
            question = {"call": call, "kernels": [kernel.key for kernel in kernels]}
            reply = self._child.ask(question, limit_s)
        except UnfitError:
            self._child = None
            raise
        if "unfit" in reply:
            raise UnfitError(reply["unfit"])
        return reply["value"]


def _start(command: Sequence[str], limit_s: float) -> _Child:
    """A child that is ready.

    Raises:
        RejectedError: it does not get so far; that is the machine's or MLX's fault, no kernel's.
        ResourceError: the system killed it, or gave it too little memory.
    """
    child = _Child(command)
    try:
        child.receive(limit_s)
    except UnfitError as error:
        scarce = "SIGKILL" in str(error) or out_of_memory(error)
        kind = ResourceError if scarce else RejectedError
        raise kind(f"the process that tries the kernels does not start: {error}") from None
    return child


class _Child:
    """One process; after an `UnfitError` it is no more."""

    def __init__(self, command: Sequence[str]) -> None:
        self._connection, theirs = Pipe()
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115
        with theirs:
            number = theirs.fileno()
            self._process = subprocess.Popen(
                [*command, str(number)],
                stdin=subprocess.DEVNULL,
                stdout=self._stderr,
                stderr=self._stderr,
                pass_fds=(number,),
            )

    def ask(self, question: Mapping[str, Any], limit_s: float) -> dict[str, Any]:
        with suppress(OSError):
            self._connection.send_bytes(json.dumps(question).encode())
        return self.receive(limit_s)

    def receive(self, limit_s: float) -> dict[str, Any]:
        try:
            if not self._connection.poll(limit_s):
                self.end()
                raise UnfitError(f"hangs: no answer within {limit_s:g} s")
            reply: dict[str, Any] = json.loads(self._connection.recv_bytes())
        except (EOFError, OSError):
            raise UnfitError(self._death()) from None
        return reply

    def end(self) -> None:
        """End it, whatever it does."""
        self._process.kill()
        # One that waits for the GPU inside the system may take its time to go.
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=10)
        self._close()

    def _death(self) -> str:
        try:
            code = self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.end()
            return "closed its pipe"
        self._stderr.seek(0)
        lines = self._stderr.read().decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        how = signal.Signals(-code).name if code < 0 else f"code {code}"
        self._close()
        return f"ends its process ({how})" + (f": {last[:300]}" if last else "")

    def _close(self) -> None:
        self._connection.close()
        self._stderr.close()
