"""A place for the output that cannot be written, or is taken away meanwhile."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from apertus_mlx.convert.write.target import check_target
from apertus_mlx.convert.write.workspace import open_workspace, partial_path
from apertus_mlx.errors import ResourceError


def lose(target: Path) -> None:
    """Build an output in a folder that is gone when its first file is to be written."""
    with open_workspace(target, "0" * 16, resume=False) as workspace:
        shutil.rmtree(partial_path(target))
        (workspace.path / "config.json").write_text("{}")


def test_a_partial_folder_that_is_taken_away(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"\.out\.partial"):
        lose(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the system answers on a disk that is read-only, to root as well."""
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ResourceError, match="cannot be written"):
        check_target(tmp_path / "out", None)
