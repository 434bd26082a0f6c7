"""`apertus-mlx serve` as a process of its own, for clients that need a port."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
from typing import Any

from tests.commands import COMMAND


class Process:
    """`apertus-mlx serve`, on a free port."""

    def __init__(self, *arguments: str) -> None:
        self._process = subprocess.Popen(
            [*COMMAND, "serve", "--port", "0", *arguments],
            stderr=subprocess.PIPE, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        assert self._process.stderr is not None
        self.lines: list[str] = []
        for line in self._process.stderr:
            self.lines.append(line)
            if found := re.search(r"serving .* at (http://\S+):(\d+)/v1", line):
                self.port = int(found[2])
                break
        self._reading = threading.Thread(target=self._read)
        self._reading.start()

    def _read(self) -> None:
        assert self._process.stderr is not None
        self.lines += self._process.stderr

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def base(self) -> str:
        """What clients of OpenAI take as their base URL."""
        return f"http://127.0.0.1:{self.port}/v1"

    def client(self) -> Any:
        from openai import OpenAI

        # The model is loaded meanwhile: 503 with Retry-After, which the client honours.
        return OpenAI(base_url=self.base, api_key="none", max_retries=20)

    def end(self, how: int = signal.SIGTERM) -> int:
        if self._process.poll() is None:
            self._process.send_signal(how)
        code = self._process.wait(60)
        self._reading.join()
        return code
