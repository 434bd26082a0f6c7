"""Writing a file so that it is there whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from apertus_mlx.system.beside import beside

# In the name of a file that is being written.
UNFINISHED = ".unfinished"
# A longer ending tells a writer nothing, and would leave no bytes for the name.
MAX_SUFFIX_BYTES = 16
# What file systems answer that cannot bring a folder to the disk, or let it be opened for that.
_NO_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY,
            errno.EACCES, errno.EPERM, errno.EBADF, errno.EISDIR}  # fmt: skip


@contextmanager
def whole_file(path: Path, *, durable: bool = True, mode: int = 0o666) -> Iterator[Path]:
    """Yield a name beside `path` to write to; afterwards `path` is that file.

    It is so durably (`sync`), or without `durable`, for what can be made again, whenever the system
    writes it. A link at `path` stays one. `mode`: who may read and write it, less what the process
    allows nobody.

    On a failure `path` is as it was and nothing lies beside it. A kill may leave the file beside,
    which the next attempt replaces. Who writes the same file meanwhile, in this process or another,
    waits for its turn.

    Raises:
        OSError: it cannot be written.
    """
    path = Path(os.path.realpath(path))
    unfinished = unfinished_path(path)
    try:
        claim = _claim(unfinished, mode)
    except OSError as error:
        _name_whole(error, unfinished, path)
        raise
    try:
        yield unfinished
        if durable:
            sync(unfinished)
        unfinished.replace(path)
    except BaseException as error:
        unfinished.unlink(missing_ok=True)
        _name_whole(error, unfinished, path)
        raise
    finally:
        os.close(claim)
    if durable:
        sync_folder(path.parent)


def _name_whole(error: BaseException, unfinished: Path, path: Path) -> None:
    """Let an error name the file that somebody asked for, not the one beside it."""
    if isinstance(error, OSError) and error.filename == str(unfinished):
        error.filename = str(path)


def _claim(unfinished: Path, mode: int) -> int:
    """Make the file, empty and locked; returns the descriptor that holds the lock.

    Whatever else has that name, a link to another file for instance, is not written through.
    """
    while True:
        with suppress(FileNotFoundError):
            if not stat.S_ISREG(unfinished.lstat().st_mode):
                unfinished.unlink()
        claim = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
        try:
            _lock(claim)
            with suppress(FileNotFoundError):
                # Who had it before has renamed or removed it.
                if os.path.samestat(os.fstat(claim), unfinished.lstat()):
                    os.truncate(claim, 0)
                    return claim
        except BaseException:
            os.close(claim)
            raise
        os.close(claim)


def _lock(descriptor: int) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS):
            raise


def unfinished_path(path: Path) -> Path:
    """Where `path` is written; its ending stays, since some writers go by it."""
    suffix = path.suffix if len(os.fsencode(path.suffix)) <= MAX_SUFFIX_BYTES else ""
    return beside(path, f"{UNFINISHED}{suffix}")


def sync(path: Path, *, through_cache: bool = False) -> None:
    """Hand a file to the drive.

    On Linux it then lies on the drive itself. On macOS it may lie in the drive's own cache, which a
    power loss empties, except with `through_cache`: that empties the cache, of all files, and is
    slow. Where a file system knows no such thing it gets the ordinary call.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        flush = getattr(fcntl, "F_FULLFSYNC", None)
        if through_cache and flush is not None:
            try:
                fcntl.fcntl(descriptor, flush)
            except OSError as error:
                if error.errno not in _NO_SYNC:
                    raise
            else:
                return
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    """The same for the names in a folder; not every file system can, and that is no failure."""
    try:
        sync(path)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
