"""Calls into Rust libraries: a panic becomes an exception, and writes nothing on the screen."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

_Arguments = ParamSpec("_Arguments")
_Value = TypeVar("_Value")
_STDERR = 2
_SILENT = threading.Lock()


class PanicError(Exception):
    """A Rust library gave up; the message is its own first line."""


def guarded(
    function: Callable[_Arguments, _Value], *args: _Arguments.args, **kwargs: _Arguments.kwargs
) -> _Value:
    """Return `function(*args, **kwargs)`.

    A panic is a BaseException in Python, past every handler of errors, and before it is raised the
    library prints a report of its own. An interrupt comes when the call is over, as it would
    without this: no such library looks for one.

    Raises:
        PanicError: the library panicked.
    """
    try:
        with _interrupts_later(), _silent():
            return function(*args, **kwargs)
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # PyO3 exports no name to catch it by
            raise
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise PanicError(reason[:200]) from None


@contextlib.contextmanager
def _interrupts_later() -> Iterator[None]:
    """Hold an interrupt back until the end, so that none comes between two halves of a change.

    Only the main thread gets any. Where an interrupt is no exception it does as it always did.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    came: list[int] = []
    try:
        signal.signal(signal.SIGINT, lambda number, _: came.append(number))
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if came:
            signal.raise_signal(signal.SIGINT)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Send descriptor 2 to nowhere; it is the process's, so what other threads write is lost."""
    if not _SILENT.acquire(blocking=False):
        # Another thread's call is silent now. Nobody ever waits: a report on the screen is better.
        yield
        return
    kept = None
    try:
        with contextlib.suppress(OSError):  # no descriptor 2, or none left: nothing is silenced
            kept = os.dup(_STDERR)
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, _STDERR)
            os.close(nowhere)
        yield
    finally:
        if kept is not None:
            os.dup2(kept, _STDERR)
            os.close(kept)
        _SILENT.release()
