"""The one door to files that came from elsewhere: regular, in their folder, of bounded size.

A model folder may come from a stranger. A link in it may lead to a private file, a FIFO never
ends, a device does things when it is opened. So every file is looked at before it is opened, and
what is no regular file is refused, not taken for absent.
"""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path
from typing import BinaryIO

from apertus_mlx.errors import RejectedError

# More than the weights of any Apertus, in one file.
MAX_WEIGHTS_BYTES = 2**40
MAX_TOKENIZER_BYTES = 128 * 2**20
# JSON files, licences, cards.
MAX_TEXT_BYTES = 64 * 2**20
# Files of gigabytes are copied in few calls.
COPY_BLOCK_BYTES = 16 * 2**20
LFS_POINTER = b"version https://git-lfs"


def exists(path: Path) -> bool:
    """Whether the folder has anything of that name: a broken link and a FIFO count, too."""
    return os.path.lexists(path)


def open_file(path: Path, most_bytes: int = MAX_WEIGHTS_BYTES) -> BinaryIO:
    """Open a file of a model folder for reading.

    Raises:
        RejectedError: it is missing, no regular file, or larger than `most_bytes`; or a link to
            what lies neither in the folder nor in the blobs of a Hub cache.
    """
    return _open(path, checked(path, most_bytes), most_bytes)


def read_file(path: Path, most_bytes: int = MAX_TEXT_BYTES) -> bytes:
    """All of a file of a model folder.

    Raises:
        RejectedError: see `open_file`; also a Git LFS pointer in place of the file.
    """
    with open_file(path, most_bytes) as file:
        return _read(path, file, most_bytes)


def copy_file(path: Path, target: Path, most_bytes: int = MAX_TEXT_BYTES) -> None:
    """Copy a file of a model folder, and nothing but its bytes; errors as of `open_file`."""
    with open_file(path, most_bytes) as source, target.open("wb") as copy:
        shutil.copyfileobj(source, copy, COPY_BLOCK_BYTES)


def checked(path: Path, most_bytes: int = MAX_WEIGHTS_BYTES) -> Path:
    """Where the file of a model folder lies, for a library that opens files by name.

    Raises:
        RejectedError: see `open_file`.
    """
    real = _real_path(path)
    root = _real_path(path.parent)
    if not real.is_relative_to(root) and not _is_hub_blob(real):
        raise RejectedError(f"{path}: links to a file outside the model folder")
    return _regular(path, real, most_bytes)


def read_own_file(path: Path, most_bytes: int = MAX_TEXT_BYTES) -> bytes:
    """All of a file that the user named, which may be a link to anywhere; else as `read_file`."""
    with _open(path, _regular(path, _real_path(path, ""), most_bytes), most_bytes) as file:
        return _read(path, file, most_bytes)


def refuse_pointer(start: bytes, name: str) -> None:
    """Refuse the pointer that Git LFS leaves in place of a file; `start` is how the file begins."""
    if start.startswith(LFS_POINTER):
        raise RejectedError(f"{name}: is a Git LFS pointer, not the file; run `git lfs pull`")


def is_plain_name(name: str) -> bool:
    """Whether a name that a checkpoint gives stays inside its folder on every system."""
    return (
        name.isprintable()
        and not {"/", "\\", ":", "\0"} & set(name)
        and not name.startswith(".")
        and 0 < len(name.encode()) <= 255
    )


def check_folder(directory: Path) -> None:
    """Refuse a folder with anything that `open_file` would refuse, before others read in it."""
    for path in sorted(directory.rglob("*")):
        if path.is_symlink() or not path.is_dir():
            checked(path)


def _real_path(path: Path, way_out: str = "; fetch the checkpoint again") -> Path:
    try:
        return Path(os.path.realpath(path, strict=True))
    except OSError as error:
        if path.is_symlink():
            raise RejectedError(f"{path}: is a broken link{way_out}") from None
        if isinstance(error, FileNotFoundError):
            raise RejectedError(f"{path}: is missing{way_out}") from None
        raise _unreadable(path, error) from None


def _is_hub_blob(real: Path) -> bool:
    """Whether a file lies where the Hub client keeps contents: `models--.../blobs/HASH`."""
    return real.parent.name == "blobs" and real.parent.parent.name.startswith("models--")


def _regular(path: Path, real: Path, most_bytes: int) -> Path:
    try:
        _require_regular(path, real.lstat(), most_bytes)
    except OSError as error:
        raise _unreadable(path, error) from None
    return real


def _require_regular(path: Path, status: os.stat_result, most_bytes: int) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise RejectedError(f"{path}: is not a regular file")
    if status.st_size > most_bytes:
        raise RejectedError(
            f"{path}: {status.st_size} bytes is too large; at most {most_bytes} are read"
        )


def _open(path: Path, real: Path, most_bytes: int) -> BinaryIO:
    # What was looked at may have been exchanged: neither follow a link nor wait for a FIFO.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    try:
        file = os.fdopen(os.open(real, flags), "rb")
    except OSError as error:
        raise _unreadable(path, error) from None
    try:
        _require_regular(path, os.fstat(file.fileno()), most_bytes)
    except BaseException:
        file.close()
        raise
    return file


def _read(path: Path, file: BinaryIO, most_bytes: int) -> bytes:
    try:
        # What is asked for is allocated at once, so the most only of a file that has more than it
        # says, such as those in /proc.
        size = min(os.fstat(file.fileno()).st_size, most_bytes)
        data = file.read(size + 1)
        if len(data) > size:
            data += file.read(most_bytes + 1 - len(data))
    except OSError as error:
        raise _unreadable(path, error) from None
    if len(data) > most_bytes:
        raise RejectedError(f"{path}: is too large; at most {most_bytes} bytes are read")
    refuse_pointer(data, str(path))
    return data


def _unreadable(path: Path, error: OSError) -> RejectedError:
    return RejectedError(f"{path}: cannot be read ({error.strerror})")
