"""What libraries written in Rust raise over a file of a model, as a refusal in one line.

A panic there is a `BaseException` that no handler expects, and it first writes a report over the
terminal, which may quote the file.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

from apertus_mlx.errors import ApertusError, RejectedError

# Two threads that exchange stderr at once could put back each other's.
_one_at_a_time = threading.RLock()


def is_panic(error: BaseException) -> bool:
    """Whether `error` is a panic of a Rust library; each has a class of its own of this name."""
    return type(error).__name__ == "PanicException"


@contextmanager
def refused(problem: str) -> Iterator[None]:
    """Turn what the body raises into a RejectedError that says `problem` and the reason.

    Interrupts, errors of ours and a lack of memory pass.
    """
    try:
        with _panics_silent():
            yield
    except (ApertusError, MemoryError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise RejectedError(f"{problem} ({reason})") from None


@contextmanager
def _panics_silent() -> Iterator[None]:
    """Hold back what is written to stderr; it is written after the body, unless that panics."""
    with _one_at_a_time, ExitStack() as stack:
        try:
            real = os.dup(2)
            stack.callback(os.close, real)
            held = stack.enter_context(tempfile.TemporaryFile())
        except OSError:  # no stderr, or nowhere to keep it: a panic is still caught
            yield
            return
        os.dup2(held.fileno(), 2)
        panicked = False
        try:
            yield
        except BaseException as error:
            panicked = is_panic(error)
            raise
        finally:
            os.dup2(real, 2)
            if not panicked and held.seek(0, os.SEEK_END):
                held.seek(0)
                with suppress(OSError):
                    os.write(2, held.read())
