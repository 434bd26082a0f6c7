"""What a person is told when work that can go on was cut off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from apertus_mlx.cli.sink import note


@contextmanager
def resumable() -> Iterator[None]:
    """Run work that builds a folder; cut off, it says how to go on, where that is possible."""
    from apertus_mlx.convert.write.workspace import RESUMES, how_to_go_on

    try:
        yield
    except BaseException as error:
        # An error of ours says it itself.
        folder = getattr(error, RESUMES, None)
        if folder is not None:
            note(f"interrupted; {how_to_go_on(folder)}")
        raise
