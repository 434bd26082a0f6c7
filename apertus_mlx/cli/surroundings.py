"""What a command finds when it starts: streams, arguments, current folder, environment.

Made sound where that can be done without loss, else refused before any work.
"""

from __future__ import annotations

import fcntl
import io
import os
import resource
import sys
from typing import TextIO

from apertus_mlx.errors import ResourceError, UsageError
from apertus_mlx.system.sizes import format_binary

# Variables that switch something, and those that hold whole numbers, of ours and of the Hub's.
SWITCHES = ("APERTUS_MLX_DEBUG", "APERTUS_MLX_KERNELS")
COUNTS = ("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT")
NAMES = ("APERTUS_MLX_CACHE", "HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME", "HOME", "TMPDIR")

# Addresses that the libraries take with the smallest model, measured on Linux, and those of each
# thread of OpenBLAS, which numpy computes with. Where that gets less, it waits for ever or crashes.
LIBRARY_BYTES, BLAS_THREAD_BYTES = 256 * 2**20, 41 * 2**20
MAX_BLAS_THREADS = 64


def open_streams() -> bool:
    """Give every standard descriptor something to be, before any file is opened.

    A closed one would become the number of the next file, and notes would end up in it. Returns
    whether stdout was closed, or open for reading only.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # The lowest free number is taken; those below are taken by now. Children get it, too.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115
    no_stdout = sys.stdout is None or not _can_write(sys.stdout)
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # What its encoding lacks is shown escaped, so that a text is never cut off there.
            stream.reconfigure(errors="backslashreplace")
    return no_stdout


def _can_write(stream: TextIO) -> bool:
    try:
        descriptor = stream.fileno()
        if not os.get_blocking(descriptor):
            # Whoever started this left it so; half a text would be written.
            os.set_blocking(descriptor, True)
        return fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY
    except OSError:  # no file at all, as in tests
        return True


def check_surroundings(no_stdout: bool) -> None:
    """Refuse surroundings that no command can work in.

    Raises:
        UsageError: stdout is closed, an argument is not UTF-8, the current folder is gone, or a
            variable of the environment has no sensible value.
        ResourceError: memory is limited so far that the libraries cannot be loaded.
    """
    if no_stdout:
        raise UsageError("standard output is closed; send it somewhere, or to /dev/null")
    try:
        os.getcwd()  # noqa: PTH109 (the same call, without a Path)
    except OSError as error:
        raise UsageError(
            f"the current folder cannot be found any more ({error.strerror}); change to another"
        ) from None
    for number, argument in enumerate(sys.argv[1:], 1):
        _require_utf8(f"argument {number}", argument)
    for name in NAMES:
        _require_utf8(name, os.environ.get(name, ""))
    for name in SWITCHES:
        if os.environ.get(name, "") not in ("", "0", "1"):
            raise UsageError(f"{name}={os.environ[name][:40]!r}: expected 0 or 1")
    for name in COUNTS:
        value = os.environ.get(name, "")
        if value and not (value.isascii() and value.isdecimal() and len(value) < 10):
            raise UsageError(f"{name}={value[:40]!r}: expected a whole number of seconds")
    from apertus_mlx.backend.cpu.threads import THREADS_VARIABLE, thread_count

    if os.environ.get(THREADS_VARIABLE):
        thread_count()
    if sys.platform == "linux":
        _require_addresses()


def _require_addresses() -> None:
    from apertus_mlx.backend.hardware import usable_processors

    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return
    threads = min(len(usable_processors()), MAX_BLAS_THREADS)
    stated = os.environ.get("OPENBLAS_NUM_THREADS", "")
    if stated.isdecimal():
        threads = max(1, min(threads, int(stated)))
    needed = LIBRARY_BYTES + threads * BLAS_THREAD_BYTES
    if limit < needed:
        raise ResourceError(
            f"memory is limited to {format_binary(limit)} of addresses (ulimit -v), the "
            f"libraries alone take {format_binary(needed)}; raise the limit"
            + ("" if threads == 1 else ", or set OPENBLAS_NUM_THREADS=1")
        )


def _require_utf8(name: str, value: str) -> None:
    data = os.fsencode(value)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{name}: {value[:100]!r}: byte {data[error.start]:#04x} at {error.start} is not "
            "UTF-8; write or rename it in UTF-8"
        ) from None
    if text != value and not text.isascii():
        raise UsageError(f"{name}: {text[:100]!r}: this locale is not UTF-8; set LC_ALL=C.UTF-8")
