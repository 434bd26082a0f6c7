"""The process that renders chat templates: Python with Jinja alone, which the system bounds.

A template is a program of somebody else's, so it runs where it can be ended. One process renders
all templates of this one; after its end the next rendering starts another.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from select import select

from apertus_mlx.errors import RejectedError, ResourceError
from apertus_mlx.system.sizes import format_bytes

_SANDBOX = Path(__file__).parent / "template" / "sandbox.py"
_LOOK_S = 0.01


class UnsupportedTemplateError(RejectedError):
    """A sound template that asks for what the sandbox does not have, or refuses the messages."""


class TemplateProcess:
    """Renders templates in a process of its own; threads take turns.

    Args:
        seconds: The most processor time of one rendering.
        memory_bytes: The most memory that the process may take.
        watched: Whether this process has to look at that, as on macOS, which does not bound it.
    """

    def __init__(
        self,
        seconds: float = 5,
        memory_bytes: int = 2**28,
        watched: bool = sys.platform == "darwin",
    ) -> None:
        self._seconds, self._memory_bytes, self._watched = seconds, memory_bytes, watched
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the process if it does not run; it gets ready while this one goes on."""
        with self._lock, suppress(ResourceError):
            self._running()

    def end(self) -> None:
        """End the process; the next rendering starts another."""
        if self._process:
            self._process.kill()
            with suppress(BrokenPipeError), self._process:
                self._process = None

    def end_for_good(self) -> None:
        """End the process with the program; threads that still want to render wait for that."""
        if self._lock.acquire(timeout=1):  # if not, it ends when nobody is left to ask it
            self.end()

    def render(self, question: Mapping[str, object]) -> str:
        """Return what a template writes; see `render` in `template/sandbox.py`.

        Raises:
            RejectedError: the template is damaged, refuses the messages, or takes too much.
            ResourceError: no Python can run it, or no process can be started.
        """
        line = json.dumps(question).encode() + b"\n"
        with self._lock:
            process = self._running()
            try:
                answer = self._ask(process, line)
                if not answer.endswith(b"\n"):
                    raise self._ended(process.wait(), question["name"])
            except BaseException:  # an interrupt too, after which an old answer would come
                self.end()
                raise
        kind, text = json.loads(answer)
        if kind != "written":
            raise RejectedError(text) if kind == "damaged" else UnsupportedTemplateError(text)
        return str(text)

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process and self._process.poll() is not None:
            self.end()
        if not self._process:
            limits = [str(self._seconds), str(0 if self._watched else self._memory_bytes)]
            try:
                self._process = subprocess.Popen(
                    [_python(), "-I", "-S", str(_SANDBOX), *limits, *filter(None, sys.path)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,  # an interrupt from the terminal is not for it
                )
            except (FileNotFoundError, PermissionError):
                raise _no_python() from None
            except OSError as error:  # too many files or processes, too little memory
                raise ResourceError(
                    f"no process for chat templates can be started: {error.strerror}"
                ) from None
        return self._process

    def _ask(self, process: subprocess.Popen[bytes], line: bytes) -> bytes:
        """Return the answer, which ends with a line break unless the process has ended."""
        assert process.stdin and process.stdout
        with suppress(BrokenPipeError):
            process.stdin.write(line)
            process.stdin.flush()
        while self._watched and not select([process.stdout], [], [], _LOOK_S)[0]:
            import psutil

            with suppress(psutil.Error):
                if psutil.Process(process.pid).memory_info().rss > self._memory_bytes:
                    process.kill()
        return process.stdout.readline()

    def _ended(self, code: int, name: object) -> Exception:
        if code >= 0:  # not by a signal
            return _no_python()
        return UnsupportedTemplateError(
            f"{name}: the chat template takes more than {self._seconds:g} s of work or "
            f"{format_bytes(self._memory_bytes)} of memory; fetch it again, or say less at once"
        )


def _python() -> str:
    """Return the Python that runs this; a program frozen into one file would start once more."""
    return "" if getattr(sys, "frozen", False) else sys.executable


def _no_python() -> ResourceError:
    return ResourceError(f"{_python()!r} is no Python with Jinja, which chat templates need")


TEMPLATES = TemplateProcess()
atexit.register(TEMPLATES.end_for_good)
os.register_at_fork(after_in_child=TEMPLATES.__init__)  # type: ignore[misc]
