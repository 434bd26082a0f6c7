"""What the system and other libraries raise in a situation of the user's, as errors of ours.

The last resort: who knows more about the file or the request says more. What is no situation of
the user's stays as it is, a bug.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from apertus_mlx.errors import ApertusError, NotFoundError, ResourceError, UsageError

# Of errors of the system: codes, the error of ours, and what it says.
_MEANINGS: tuple[tuple[set[int], type[ApertusError], str], ...] = (
    ({errno.ENOSPC, errno.EDQUOT, errno.EFBIG},
     ResourceError, "the disk is full; make room and try again"),
    ({errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.ENXIO, errno.ENODEV,
      errno.EBUSY, errno.ETXTBSY}, ResourceError, "cannot be read or written ({})"),
    ({errno.EAGAIN, errno.ENOBUFS, errno.EMFILE, errno.ENFILE},
     ResourceError, "the system has nothing left to give ({})"),
    ({errno.ENAMETOOLONG, errno.EILSEQ, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY},
     UsageError, "not a name that can be used here ({})"),
    ({errno.ENOENT, errno.ENOTDIR, errno.ELOOP}, NotFoundError, "not there ({})"),
    ({errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.ETIMEDOUT,
      errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN, errno.EADDRNOTAVAIL},
     NotFoundError, "not reachable ({})"),
)  # fmt: skip
# What MLX (nanobind), Metal, onnxruntime, the loader and Python's threads say when memory runs
# out. They raise RuntimeError, ImportError or classes of their own.
_MEMORY_WORDS = ("bad_alloc", "unable to allocate", "failed to allocate", "cannot allocate memory",
                 "out of memory", "can't start new thread", "resource temporarily unavailable",
                 "failed to map segment", "maximum allowed buffer size",
                 "insufficient memory", "outofmemory")  # fmt: skip
# Of MLX's backends: operations, shapes, types and widths that one has and another has not.
_REFUSAL = re.compile(
    r"no implementation for|has no \w+ implementation|::eval_[cg]pu\] .*(not implemented|not "
    r"supported)|\] (.*\b)?NYI\b|(-bit quantization|group size \d+) is not supported",
    re.IGNORECASE | re.DOTALL,
)
# Of MLX's library for CUDA, where driver, card or headers do not suit it.
_UNSUITED = re.compile(
    r"locations of CUDA headers|CUDA driver version|no kernel image|CUDA-capable device|"
    r"PTX was compiled with an unsupported",
    re.IGNORECASE,
)


def explain(error: BaseException) -> ApertusError | None:
    """The error of ours that says what `error` means to a user; None where it is a bug.

    Interrupts and exits are not errors: None.
    """
    if isinstance(error, ApertusError):
        return error
    if not isinstance(error, Exception):
        return None
    if out_of_memory(error):
        return no_memory(error)
    if isinstance(error, ImportError) and "cannot open shared object file" in str(error):
        return NotFoundError(
            f"a library cannot be loaded ({' '.join(str(error).split())[:200]}); install what "
            "needs it again; docs/cuda.md says how for MLX on CUDA"
        )
    if isinstance(error, RuntimeError) and _UNSUITED.search(str(error)):
        return NotFoundError(
            f"MLX's library for CUDA does not work here ({' '.join(str(error).split())[:200]}); "
            "docs/cuda.md says which one to install, and how to put the processor's back"
        )
    if refused_by_backend(error):
        reason = " ".join(str(error).split())[:200]
        return UsageError(
            f"MLX cannot compute this on the device that it uses here ({reason}); --compute cpu, "
            "another --dtype, --kv-bits 16 or a model in other bits may do"
        )
    if isinstance(error, UnicodeEncodeError) and error.reason == "surrogates not allowed":
        return UsageError(f"{error.object[:200]}: not UTF-8; give it another name")
    if isinstance(error, ValueError) and "embedded null" in str(error):
        return UsageError("a name of a file or folder has a NUL character; give it another name")
    if isinstance(error, OSError):
        return _explain_os_error(error)
    return None


@contextmanager
def own_errors() -> Iterator[None]:
    """Raise what `explain` knows as the error of ours; a decorator too."""
    try:
        yield
    except Exception as error:
        known = explain(error)
        if known is None or known is error:
            raise
        raise known from error


def out_of_memory(error: Exception) -> bool:
    """Whether `error` says that there is not enough memory, whichever library raised it."""
    if isinstance(error, MemoryError) or (
        isinstance(error, OSError) and error.errno == errno.ENOMEM
    ):
        return True
    return not isinstance(error, ApertusError | OSError) and any(
        word in str(error).lower() for word in _MEMORY_WORDS
    )


def refused_by_backend(error: Exception) -> bool:
    """Whether MLX says by `error` that it lacks an operation on this device, not that it failed.

    Gradients that it lacks are a bug of ours: it lacks them everywhere.
    """
    text = str(error)
    return (
        type(error) in (RuntimeError, ValueError)
        and _REFUSAL.search(text) is not None
        and (re.search(r"::?(vjp|jvp|vmap)\b", text) is None)
    )


def no_memory(error: Exception) -> ResourceError:
    """The error of ours for `error`, which is `out_of_memory`."""
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return ResourceError(
        f"not enough memory ({reason}); end other programs, raise the limit that is set for this "
        "one, or take a model with fewer bits or a shorter context"
    )


def _explain_os_error(error: OSError) -> ApertusError | None:
    code = error.errno
    where = f"{_name(error.filename2 or error.filename)}: "
    if error.filename is None:
        where = ""
    if isinstance(error, FileNotFoundError) and "temporary directory" in str(error.strerror):
        return ResourceError(f"{error.strerror}; set TMPDIR to a folder that can be written")
    for codes, kind, words in _MEANINGS:
        if code in codes:
            return kind(f"{where}{words.format(error.strerror)}")
    return None


def _name(name: object) -> str:
    text = os.fsdecode(name) if isinstance(name, str | bytes) else str(name)
    return text if len(text) <= 200 else f"{text[:100]}...{text[-90:]}"
