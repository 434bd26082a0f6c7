"""Writing a file so that it is there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from apertus_mlx.beside import beside

# In the name of a file that is being written.
UNFINISHED = ".unfinished"


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a name beside `path` to write to; afterwards `path` is that file, durably.

    On a failure `path` is as it was and nothing lies beside it. A kill may leave the file beside,
    which the next attempt replaces.

    Raises:
        OSError: it cannot be written.
    """
    path = Path(os.path.realpath(path))
    unfinished = unfinished_path(path)
    # Whatever has that name, a link to another file for instance, is not written through.
    unfinished.unlink(missing_ok=True)
    try:
        yield unfinished
        sync(unfinished)
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    sync(path.parent)


def unfinished_path(path: Path) -> Path:
    """Where `path` is written; its ending stays, since some writers go by it."""
    return beside(path, f"{UNFINISHED}{path.suffix}")


def sync(path: Path) -> None:
    """Bring a file or folder to the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
