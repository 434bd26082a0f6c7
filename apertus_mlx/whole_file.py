"""Writing a file so that it is there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Before the name of a file that is being written; its ending stays, since some writers go by it.
UNFINISHED = ".unfinished-"


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a name beside `path` to write to; afterwards `path` is that file, durably.

    On a failure `path` is as it was and nothing lies beside it. A kill may leave the file beside,
    which the next attempt replaces.

    Raises:
        OSError: it cannot be written.
    """
    path = Path(os.path.realpath(path))
    beside = path.with_name(f"{UNFINISHED}{path.name}")
    # Whatever has that name, a link to another file for instance, is not written through.
    beside.unlink(missing_ok=True)
    try:
        yield beside
        sync(beside)
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Bring a file or folder to the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
