"""An output's final name: checked, with the disk, before any work, and given when all is there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from apertus_mlx.convert.sources.reading import FileState, file_states
from apertus_mlx.convert.write.workspace import (
    Workspace,
    clear_published,
    is_published,
    open_workspace,
    partial_path,
)
from apertus_mlx.errors import RejectedError, ResourceError, UsageError
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


def build(
    target: Path,
    fingerprint: tuple[str, str],
    sources: Mapping[Path, Mapping[str, FileState]],
    needed: tuple[int, int],
    resume: bool,
    make: Callable[[Workspace], None],
) -> None:
    """Let `make` write the output, unless an earlier run has; it appears complete or not at all.

    Args:
        target: the output folder.
        fingerprint: of the request and of the steps (`Workspace.follow`).
        sources: folders that are read, and the state of their files before.
        needed: bytes of the output, and of what lies beside it until it is done.
        resume: whether to go on with what an interrupted run left.
        make: writes the output; what is finished in the workspace it does not do again.

    Raises:
        UsageError: the target is taken, or another run to it is going on or unfinished.
        ResourceError: the disk is full or cannot be written.
        RejectedError: a source changed meanwhile.
    """
    if resume and is_published(target, *fingerprint):
        clear_published(target)
        return
    for source in sources:
        check_target(target, source)
    check_space(target, *needed)
    with open_workspace(target, fingerprint[0], resume) as workspace:
        workspace.follow(fingerprint[1])
        if not workspace.is_complete:
            make(workspace)
            for source, states in sources.items():
                if file_states(source, states) != states:
                    # Of what is there nobody knows which source it is made of.
                    workspace.discard()
                    raise RejectedError(f"{source}: changed meanwhile; start again")
        workspace.publish()


def _held_bytes(folder: Path) -> int:
    """What the files below a folder take on disk; another process may be changing it."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                total += 512 * Path(place, name).lstat().st_blocks
    return total
