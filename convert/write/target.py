"""Checks an output's final name and the disk before any work."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

from apertus_mlx.convert.write.workspace import partial_path
from apertus_mlx.errors import ResourceError, UsageError
from apertus_mlx.system.sizes import format_bytes

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
            # A kill right after it got its name may have left this empty.
            with suppress(OSError):
                partial_path(target).rmdir()
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


def check_space(target: Path, output_bytes: int, kept_bytes: int) -> None:
    """Refuse an output that does not fit on the disk; files of an interrupted run count as room.

    Args:
        target: the output folder.
        output_bytes: what it will take.
        kept_bytes: of the working files beside it, until it is done.

    Raises:
        ResourceError: the disk has less room than the plan needs.
    """
    parent = target.resolve().parent
    free = shutil.disk_usage(parent).free
    if free + _held_bytes(partial_path(target)) < output_bytes + kept_bytes + SPARE_BYTES:
        more = f" and {format_bytes(kept_bytes)} beside it until it is done" if kept_bytes else ""
        raise ResourceError(
            f"{parent}: {format_bytes(free)} free, the output takes "
            f"{format_bytes(output_bytes)}{more}; choose another disk or fewer bits"
        )


def _held_bytes(folder: Path) -> int:
    """What the files below a folder take on disk; another process may be changing it."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                total += 512 * Path(place, name).lstat().st_blocks
    return total
