"""The folder in which an output is built: beside its final name, locked, resumable, then renamed.

`OUT` is built in `.OUT.partial`, which holds everything that a run writes: the output itself, what
an interrupted run goes on from, and a journal. A file lock on that folder keeps a second run out
and goes with its process. The journal names what the run was asked for, then holds one line per
finished step with a checksum of what it wrote, so that neither a kill nor a power loss can pass
half a tensor for a whole one.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from apertus_mlx.errors import ApertusError, RejectedError, ResourceError, UsageError
from apertus_mlx.system.beside import beside
from apertus_mlx.system.foreign_errors import explain
from apertus_mlx.system.whole_file import UNFINISHED, sync, sync_folder, unfinished_path, whole_file

JOURNAL = ".journal"
# The output while it is built.
OUTPUT = "output"
# A folder of what had to be measured before a plan could be made; `--plan` leaves it.
MEASURED = "measured"
# Lines of the journal beside those of steps.
_REQUEST, _STEPS, _COMPLETE = "plan", "steps", "complete"
_STEP = re.compile(r"(\d+) ([0-9a-fA-F]{8})", re.ASCII)


def how_to_go_on(folder: Path) -> str:
    """What a person is told when work in `folder` was cut off."""
    return f"--resume goes on where it stopped, {folder} holds it"


def partial_path(target: Path) -> Path:
    """Where `target` is built."""
    return beside(target, ".partial")


class Workspace:
    """The locked folder in which one output is being built."""

    def __init__(self, target: Path, folder: Path) -> None:
        self.target = target
        # Everything that a run writes lies in here.
        self.folder = folder
        # The output itself.
        self.path = folder / OUTPUT
        # Step number -> checksum of its output bytes, for the steps that are finished.
        self.done: dict[int, int] = {}
        self._lines = _read_journal(folder)
        self._journal = (folder / JOURNAL).open("a", encoding="ascii")
        self.path.mkdir(exist_ok=True)

    @property
    def is_complete(self) -> bool:
        """Whether an earlier run finished the output and only its name is missing."""
        return _COMPLETE in self._lines

    @property
    def is_precious(self) -> bool:
        """Whether work lies here that took long, and that no failure may remove."""
        return self.is_complete or any(
            path.is_file() and UNFINISHED not in path.name
            for name in _names(self.folder) - {JOURNAL, OUTPUT}
            for path in (self.folder / name, *(self.folder / name).rglob("*"))
        )

    def kept_folder(self, name: str) -> Path:
        """A folder for what work that takes long has reached; no failure removes what is in it."""
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        return folder

    @contextmanager
    def measuring(self, name: str) -> Iterator[Path]:
        """A folder for what has to be measured for a plan; afterwards it counts as measured."""
        done = self.folder / MEASURED / name
        if done.is_dir():
            yield done
            return
        folder = self.kept_folder(name)
        yield folder
        self.kept_folder(MEASURED)
        folder.rename(done)

    def follow(self, plan: str) -> None:
        """Take up the steps of the plan with this fingerprint; steps of another plan are void.

        After that `done` and `is_complete` say how far it is, and `record` may be called.
        """
        heading = f"{_STEPS} {plan}"
        complete: list[str] = []
        self.done = {}
        if heading in self._lines:
            self.done = _steps(self._lines[self._lines.index(heading) + 1 :])
            complete = [_COMPLETE] if self.is_complete else []
        else:
            # The journal first, so that no kill leaves lines about files that are gone.
            self._rewrite(self._lines[:1])
            _remove(self.path)
            self.path.mkdir()
        steps = [f"{number} {checksum:08x}" for number, checksum in self.done.items()]
        # Written anew, so that a torn last line does not run into the next one.
        self._rewrite([self._lines[0], heading, *steps, *complete])

    def _rewrite(self, lines: list[str]) -> None:
        self._lines = lines
        self._journal.close()
        _write_journal(self.folder, lines)
        self._journal = (self.folder / JOURNAL).open("a", encoding="ascii")

    def record(self, step: int, checksum: int) -> None:
        """Note a step as finished, after its bytes are written."""
        self.done[step] = checksum
        self._journal.write(f"{step} {checksum:08x}\n")
        self._journal.flush()

    def publish(self) -> None:
        """Make everything durable and give the output its final name in one move."""
        if not self.is_complete:
            for file in sorted(self.path.iterdir()):
                sync(file, through_cache=True)
            sync_folder(self.path)
            self._lines.append(_COMPLETE)
            self._journal.write(f"{_COMPLETE}\n")
            self._journal.flush()
            sync(self.folder / JOURNAL, through_cache=True)
        for name in _names(self.folder) - {JOURNAL, MEASURED, OUTPUT}:
            _remove(self.folder / name)
        try:
            self.path.rename(self.target)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise UsageError(f"{self.target}: appeared meanwhile; nothing replaced") from None
            raise
        sync_folder(self.target.parent)
        _clear(self.folder)

    def close(self) -> None:
        """Stop writing to the journal."""
        self._journal.close()

    def discard(self) -> None:
        """Remove everything."""
        self._journal.close()
        shutil.rmtree(self.folder, ignore_errors=True)


@contextmanager
def open_workspace(target: Path, fingerprint: str, resume: bool) -> Iterator[Workspace]:
    """Lock the folder in which `target` is built, fresh or as an interrupted run left it.

    It stays after an interruption, and after a failure that leaves something to go on from: where
    work took long, or where steps are done and the failure can be mended (a full disk, a bug of
    ours). An error of ours then names `--resume`; of any other, and of an interrupt, the log does.
    After other failures the folder is removed.

    Args:
        target: the final name.
        fingerprint: of everything that the output depends on.
        resume: whether to go on with what an interrupted run left. What `--plan` has measured is
            taken up in any case.

    Raises:
        UsageError: another conversion holds it, or one was interrupted and `resume` is false, or
            the interrupted one was a different conversion.
        ResourceError: the disk is full or cannot be written.
    """
    folder = partial_path(target)
    with _disk_errors(folder):
        lock = _lock(folder)
    try:
        with _disk_errors(folder):
            _start(folder, f"{_REQUEST} {fingerprint}", resume)
            workspace = Workspace(target, folder)
        try:
            with _disk_errors(folder):
                yield workspace
        except BaseException as error:
            refused = isinstance(error, RejectedError | UsageError)
            if not folder.exists():
                raise
            failed = isinstance(error, Exception)
            if failed and not workspace.is_precious and (refused or not workspace.done):
                workspace.discard()
                raise
            if isinstance(error, ApertusError):
                raise type(error)(f"{error}; {how_to_go_on(folder)}") from error
            logging.getLogger("apertus_mlx").info(f"interrupted; {how_to_go_on(folder)}")
            raise
        finally:
            workspace.close()
    finally:
        os.close(lock)


def is_published(target: Path, fingerprint: str, plan: str | None = None) -> bool:
    """Whether an earlier run of the same request gave `target` its name and was killed just then.

    What was measured for it is still there, until `clear_published`.

    Args:
        target: the final name.
        fingerprint: see `open_workspace`.
        plan: see `Workspace.follow`; None where it is not known, but follows from the fingerprint.
    """
    folder = partial_path(target)
    if not folder.is_dir() or OUTPUT in _names(folder) or JOURNAL not in _names(folder):
        return False
    if not target.is_dir() or not any(target.iterdir()):
        return False  # it was removed since
    lines = _read_journal(folder)
    if lines[:1] != [f"{_REQUEST} {fingerprint}"] or _COMPLETE not in lines:
        return False
    return plan is None or f"{_STEPS} {plan}" in lines


def clear_published(target: Path) -> None:
    """Remove what is left where `is_published`."""
    _clear(partial_path(target))


def _lock(folder: Path) -> int:
    with suppress(FileExistsError):
        folder.mkdir()
    if folder.is_symlink() or not folder.is_dir():
        raise UsageError(f"{folder}: is in the way; remove it")
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The other conversion may have removed the folder just before.
        if not folder.exists() or not os.path.samestat(os.fstat(lock), folder.stat()):
            raise BlockingIOError
    except BlockingIOError:
        os.close(lock)
        raise UsageError(f"{folder}: another conversion to the same output is running") from None
    except OSError as error:
        os.close(lock)
        with suppress(OSError):
            folder.rmdir()  # unless there is something in it
        raise ResourceError(
            f"{folder}: the file system locks no folders ({error.strerror}); choose another output"
        ) from None
    return lock


def _start(folder: Path, request: str, resume: bool) -> None:
    """See that the folder's journal is that of `request`.

    Raises:
        UsageError: what lies there is not ours, or another run's, or may not be taken up.
    """
    names = _names(folder)
    # These alone: a run was killed as it began, or as the last thing that it did.
    if names - {unfinished_path(folder / JOURNAL).name, MEASURED}:
        lines = _read_journal(folder)
        planned = MEASURED in names and not any(line.startswith(_STEPS) for line in lines)
        if _COMPLETE not in lines or OUTPUT in names:
            if not resume and not (planned and lines[:1] == [request]):
                raise UsageError(
                    f"{folder}: an interrupted conversion; continue it with --resume, or remove "
                    "that folder"
                )
            if lines[:1] == [request]:
                return
            # An empty journal says nothing about the other files.
            if lines:
                raise UsageError(
                    f"{folder}: was begun with other options or another source; remove it and "
                    "start again"
                )
    for name in names:
        _remove(folder / name)
    _write_journal(folder, [request])


def _read_journal(folder: Path) -> list[str]:
    """The whole lines of a folder's journal; none where it is empty or torn before the first."""
    path = folder / JOURNAL
    try:
        regular = stat.S_ISREG(path.lstat().st_mode)
    except FileNotFoundError:
        regular = False
    if not regular:
        raise UsageError(f"{folder}: is in the way and not ours; remove it")
    return path.read_text(encoding="ascii", errors="replace").split("\n")[:-1]


def _write_journal(folder: Path, lines: list[str]) -> None:
    text = "".join(f"{line}\n" for line in lines)
    with whole_file(folder / JOURNAL) as unfinished:
        unfinished.write_text(text, encoding="ascii")
    sync(folder / JOURNAL, through_cache=True)


def _steps(lines: list[str]) -> dict[int, int]:
    """The finished steps that lines of a journal tell of."""
    found = map(_STEP.fullmatch, lines)
    return {int(step[1]): int(step[2], 16) for step in found if step}


def _names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def _clear(folder: Path) -> None:
    """Remove the folder of a published output, the journal first."""
    (folder / JOURNAL).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _remove(entry: Path) -> None:
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry)
    else:
        entry.unlink()


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """What a disk can do to a run, in one line."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESTALE) and not folder.is_dir():
            raise ResourceError(f"{folder}: was taken away meanwhile; start again") from None
        if error.filename is None:
            error.filename = str(folder)
        meant = explain(error)
        if isinstance(meant, ResourceError):
            raise meant from None
        raise
