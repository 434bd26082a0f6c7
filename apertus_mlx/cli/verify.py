"""`apertus-mlx verify`: whether a folder is what its manifest says, and what an app trips over."""

from __future__ import annotations

from typing import Annotated, Any

from apertus_mlx.cli.options import JsonOption
from apertus_mlx.cli.output import print_report
from apertus_mlx.cli.progress import show_progress
from apertus_mlx.errors import RejectedError
from apertus_mlx.system.sizes import counted
from apertus_mlx.tools import verify as run


def verify(given: Annotated[dict[str, Any], run], *, json: JsonOption = False) -> None:
    """Check DIRECTORY: hashes, names, shapes and config, and what Swift apps need."""
    with show_progress() as progress:
        result = run(**given, progress=progress)
    words = [f"{finding.level}: {finding.where}: {finding.text}" for finding in result.findings]
    words = words or [
        f"{given['directory']}: {counted(result.files, 'file')}, all as they should be"
    ]
    print_report(json, result.as_json, lambda: words)
    if result.errors:
        first = result.errors[0]
        count = len(result.errors)
        raise RejectedError(
            f"{given['directory']}: {counted(count, 'problem')}, first: {first.where}: {first.text}"
        )
