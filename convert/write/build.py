"""Builds an output: `target` appears complete or not at all, from sources that stayed the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from apertus_mlx.convert.sources.reading import FileState, file_states
from apertus_mlx.convert.write.target import check_space, check_target
from apertus_mlx.convert.write.workspace import (
    Workspace,
    clear_published,
    is_published,
    open_workspace,
)
from apertus_mlx.errors import RejectedError


def build(
    target: Path,
    fingerprint: tuple[str, str],
    sources: Mapping[Path, Mapping[str, FileState]],
    needed: tuple[int, int],
    resume: bool,
    make: Callable[[Workspace], None],
) -> None:
    """Let `make` write the output, unless an earlier run has, and publish it as `target`.

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
