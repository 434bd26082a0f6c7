"""A process that answers questions, in JSON over a pipe; what ends it is named."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any


class EndedError(Exception):
    """The process is no more: the text says how it ended, `killed` whether the system did it."""

    def __init__(self, text: str, killed: bool = False) -> None:
        super().__init__(text)
        self.killed = killed


class OtherProcess:
    """One process, seen from the one that asks; after an `EndedError` it is no more.

    Args:
        command: what starts it; the number of the file to talk over is appended.
        environment: variables to set beside those of this process.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._connection, theirs = Pipe()
        self._output = tempfile.TemporaryFile()  # noqa: SIM115
        with theirs:
            number = theirs.fileno()
            self._process = subprocess.Popen(
                [*command, str(number)],
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=self._output,
                pass_fds=(number,),
                env={**os.environ, **environment},
            )

    def ask(self, question: Mapping[str, Any], limit_s: float | None = None) -> dict[str, Any]:
        """The answer to `question`.

        Raises:
            EndedError: it ended, or said nothing for `limit_s` seconds.
        """
        with suppress(OSError):
            send(self._connection, question)
        try:
            if self._connection.poll(limit_s):
                reply: dict[str, Any] = json.loads(self._connection.recv_bytes())
                return reply
        except (EOFError, OSError):
            raise self._ended() from None
        self.end()
        raise EndedError(f"hangs: no answer within {limit_s:g} s")

    def end(self) -> None:
        """End it, whatever it does."""
        self._process.kill()
        # One that waits for the GPU inside the system may take its time to go.
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=10)
        self._connection.close()
        self._output.close()

    def _ended(self) -> EndedError:
        try:
            code = self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.end()
            return EndedError("closed its pipe")
        self._output.seek(0)
        lines = self._output.read().decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "without a word")
        self.end()
        how = signal.Signals(-code).name if code < 0 else f"code {code}"
        return EndedError(f"ended ({how}): {last[:300]}", killed=code == -signal.SIGKILL)


def send(connection: Connection, value: Mapping[str, Any]) -> None:
    """Say `value` to the other side."""
    connection.send_bytes(json.dumps(value).encode())
