"""Weights that are cut or exchanged while they load: a damaged file, by name, in one line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from apertus_mlx.backend.choose import Compute
from apertus_mlx.errors import RejectedError
from apertus_mlx.generation.model_folder import open_folder
from apertus_mlx.generation.options import RunOptions
from tests.builders import config_4x, write_checkpoint


@pytest.mark.parametrize("compute", ["mlx", "cpu"])
@pytest.mark.parametrize("left_bytes", [0, 10_000])
def test_a_file_that_is_cut(compute: Compute, left_bytes: int, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, config_4x(num_hidden_layers=1))

    def cut(done: int, total: int) -> None:
        os.truncate(folder / "model.safetensors", left_bytes)

    with pytest.raises(RejectedError, match=r"model\.safetensors: was changed while") as caught:
        open_folder(folder).load(RunOptions(compute=compute), cut)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("compute", ["mlx", "cpu"])
def test_a_file_that_is_taken_away(compute: Compute, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, config_4x(num_hidden_layers=1))
    opened = open_folder(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(RejectedError, match=r"model\.safetensors: is missing"):
        opened.load(RunOptions(compute=compute))
