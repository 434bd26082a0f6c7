"""What a person is told when work that can go on was cut off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from apertus_mlx.cli.output import note
from apertus_mlx.errors import ApertusError


@contextmanager
def resumable(target: Path) -> Iterator[None]:
    """Run the work that builds the folder `target`; cut off, it says how to go on."""
    from convert.workspace import partial_path

    try:
        yield
    except ApertusError:
        # Its message says so where there is something to go on from.
        raise
    except BaseException:
        folder = partial_path(target)
        if folder.is_dir():
            note(f"interrupted; --resume goes on where it stopped, {folder} holds it")
        raise
