"""`apertus-mlx verify`: whether a folder is what its manifest says, and what an app trips over."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from apertus_mlx.cli.options import JsonOption
from apertus_mlx.cli.output import print_report
from apertus_mlx.errors import RejectedError


def verify(
    directory: Annotated[Path, typer.Argument(help="A folder that `convert` wrote.")],
    json: JsonOption = False,
) -> None:
    """Check DIRECTORY: hashes, names, shapes and config, and what Swift apps need."""
    from apertus_mlx.tools import verify as run

    result = run(directory)
    words = [f"{finding.level}: {finding.where}: {finding.text}" for finding in result.findings]
    words = words or [f"{directory}: {result.files} files, all as they should be"]
    print_report(json, result.as_json, lambda: words)
    if result.errors:
        first = result.errors[0]
        count = len(result.errors)
        raise RejectedError(
            f"{directory}: {count} problem{'s' if count > 1 else ''}, first: "
            f"{first.where}: {first.text}"
        )
