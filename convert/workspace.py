"""The folder in which an output is built: beside its final name, locked, resumable, then renamed.

`OUT` is built in `.OUT.partial`. A file lock on that folder keeps a second conversion out and goes
with its process. The journal holds one line per finished step with a checksum of what it wrote, so
that neither a kill nor a power loss can pass half a tensor for a whole one.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from apertus_mlx.beside import beside
from apertus_mlx.errors import ResourceError, UsageError

JOURNAL = ".journal"
# Room that a file system keeps for itself; asked for on top of the plan.
SPARE_BYTES = 16 * 2**20


def check_target(target: Path, source: Path | None) -> None:
    """Refuse a final name that is taken or dangerous, before any work.

    Raises:
        UsageError: it is a file, a folder with something in it, or lies in or around the source.
        ResourceError: its place cannot be written.
    """
    if not target.name:
        raise UsageError(f"{target}: is not a name for the output folder")
    if target.is_symlink() or target.exists():
        if not target.is_dir() or target.is_symlink():
            raise UsageError(f"{target}: exists and is not a folder; choose another output")
        if any(target.iterdir()):
            raise UsageError(f"{target}: is not empty; choose another output or remove it")
    resolved = target.resolve()
    if source is not None:
        inner = source.resolve()
        if resolved == inner or resolved in inner.parents or inner in resolved.parents:
            raise UsageError(f"{target}: lies in or around the source {source}; choose another")
    parent = resolved.parent
    if not parent.is_dir():
        raise UsageError(f"{parent}: no such folder for the output")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ResourceError(f"{parent}: cannot be written; choose another output")


def check_space(parent: Path, needed_bytes: int) -> None:
    """Refuse before the first byte what will not fit.

    Raises:
        ResourceError: the disk has less room than the plan needs.
    """
    free = shutil.disk_usage(parent).free
    if free < needed_bytes + SPARE_BYTES:
        raise ResourceError(
            f"{parent}: {free / 1e9:.2f} GB free, the output takes {needed_bytes / 1e9:.2f} GB; "
            "choose another disk or fewer bits"
        )


def partial_path(target: Path) -> Path:
    """Where `target` is built."""
    return beside(target, ".partial")


class Workspace:
    """The locked folder in which one output is being built."""

    def __init__(self, target: Path, path: Path, done: dict[int, int]) -> None:
        self.target = target
        self.path = path
        # Step number -> checksum of its output bytes, for the steps that are finished.
        self.done = done
        self._journal = (path / JOURNAL).open("a", encoding="ascii")

    def record(self, step: int, checksum: int) -> None:
        """Note a step as finished, after its bytes are written."""
        self._journal.write(f"{step} {checksum:08x}\n")
        self._journal.flush()

    def publish(self) -> None:
        """Make everything durable and give the folder its final name in one move."""
        self._journal.close()
        (self.path / JOURNAL).unlink()
        for file in sorted(self.path.iterdir()):
            _sync(file)
        _sync(self.path)
        try:
            self.path.rename(self.target)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise UsageError(f"{self.target}: appeared meanwhile; nothing replaced") from None
            raise
        _sync(self.target.parent)

    def close(self) -> None:
        """Stop writing to the journal."""
        self._journal.close()

    def discard(self) -> None:
        """Remove everything."""
        self._journal.close()
        shutil.rmtree(self.path, ignore_errors=True)


@contextmanager
def open_workspace(target: Path, fingerprint: str, resume: bool) -> Iterator[Workspace]:
    """Lock the folder in which `target` is built, fresh or as an interrupted run left it.

    On a failure the folder is removed; on an interruption (Ctrl-C) it stays for `--resume`.

    Raises:
        UsageError: another conversion holds it, or one was interrupted and `resume` is false, or
            the interrupted one was a different conversion.
        ResourceError: the disk is full or cannot be written.
    """
    path = partial_path(target)
    with _disk_errors(target):
        lock, created = _lock(path)
    try:
        with _disk_errors(target):
            done = _start(path, fingerprint, resume, created)
            workspace = Workspace(target, path, done)
        try:
            with _disk_errors(target):
                yield workspace
        except Exception:
            workspace.discard()
            raise
        finally:
            workspace.close()
    finally:
        os.close(lock)


def _lock(path: Path) -> tuple[int, bool]:
    try:
        path.mkdir()
        created = True
    except FileExistsError:
        created = False
    if path.is_symlink() or not path.is_dir():
        raise UsageError(f"{path}: is in the way; remove it")
    lock = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The other conversion may have renamed or removed the folder just before.
        if not path.exists() or not os.path.samestat(os.fstat(lock), path.stat()):
            raise BlockingIOError
    except BlockingIOError:
        os.close(lock)
        raise UsageError(f"{path}: another conversion to the same output is running") from None
    return lock, created


def _start(path: Path, fingerprint: str, resume: bool, created: bool) -> dict[int, int]:
    journal = path / JOURNAL
    names = {file.name for file in path.iterdir()}
    if not names or created:
        journal.write_text(f"plan {fingerprint}\n", encoding="ascii")
        return {}
    if JOURNAL not in names and not _is_finishing(path):
        raise UsageError(f"{path}: is in the way and not ours; remove it")
    if not resume:
        raise UsageError(
            f"{path}: an interrupted conversion; continue it with --resume, or remove that folder"
        )
    lines = (
        journal.read_text(encoding="ascii", errors="replace").splitlines()
        if (JOURNAL in names)
        else []
    )
    if not lines or lines[0] != f"plan {fingerprint}":
        if not lines or not lines[0].startswith("plan ") or len(lines[0]) < len(fingerprint) + 5:
            # Killed before the first line was whole, or while it was being renamed.
            for file in path.iterdir():
                file.unlink()
            journal.write_text(f"plan {fingerprint}\n", encoding="ascii")
            return {}
        raise UsageError(
            f"{path}: was begun with other options or another source; remove it and start again"
        )
    done = {}
    for line in lines[1:]:
        number, _, checksum = line.partition(" ")
        if number.isdigit() and len(checksum) == 8:
            try:
                done[int(number)] = int(checksum, 16)
            except ValueError:
                continue
    # A torn last line must not run into the next one.
    kept = "".join(f"{number} {checksum:08x}\n" for number, checksum in done.items())
    journal.write_text(f"plan {fingerprint}\n{kept}", encoding="ascii")
    return done


def _is_finishing(path: Path) -> bool:
    """Whether the journal was already removed and only the renaming is missing."""
    return all(file.is_file() for file in path.iterdir()) and (path / "config.json").exists()


@contextmanager
def _disk_errors(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        _explain(error, target)


def _explain(error: OSError, target: Path) -> NoReturn:
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if error.errno in full:
        raise ResourceError(f"{target}: the disk is full; nothing was left behind") from None
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO):
        raise ResourceError(f"{target}: cannot be written ({error.strerror})") from None
    if error.errno == errno.ENOENT and not partial_path(target).exists():
        raise ResourceError(f"{partial_path(target)}: was taken away meanwhile") from None
    raise error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
