"""The file that scores are written to, and the one beside it that keeps answers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from apertus_mlx.errors import ResourceError, UsageError
from apertus_mlx.system.whole_file import whole_file


def answers_path(out: Path) -> Path:
    """Where answers are kept whose scores go to `out`."""
    return out.with_name(f"{out.stem}.answers.jsonl")


def check_out(out: Path) -> None:
    """Refuse what `write_scores` could not write, before any work is done.

    Raises:
        UsageError: it is a folder, or its folder does not exist.
    """
    if not out.resolve().parent.is_dir():
        raise UsageError(f"--out {out}: its folder does not exist")
    if out.is_dir():
        raise UsageError(f"--out {out}: is a folder")


def write_scores(out: Path, values: Mapping[str, Any]) -> None:
    """Write `values` as JSON, whole or not at all.

    Raises:
        ResourceError: the file cannot be written.
    """
    text = json.dumps(values, ensure_ascii=False, indent=2) + "\n"
    try:
        with whole_file(out) as beside:
            beside.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ResourceError(f"--out {out}: {error.strerror}") from None
