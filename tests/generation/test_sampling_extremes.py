"""Numbers that float32 cannot hold, as a user gives them: an answer or a refusal, never nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from apertus_mlx.hub.demo import model_dir
from tests.commands import in_process, refusal

QUESTION = "What is the capital of France?"


def test_the_coldest_temperatures_take_the_likeliest_tokens() -> None:
    done = in_process("generate", QUESTION, "-t", "1e-37", "--seed", "3")
    assert (done.returncode, done.stdout.strip()) == (0, b"The capital of France is Paris.")


@pytest.mark.parametrize(
    ("option", "value"),
    [("--top-p", "1e-45"), ("--top-p", "1e-300"), ("--min-p", "1e-40"),
     ("--repetition-penalty", "1e-38"), ("--repetition-penalty", "1e-39")],
)  # fmt: skip
def test_what_vanishes_is_refused(option: str, value: str) -> None:
    assert option in refusal(in_process("generate", QUESTION, "-t", "1", option, value), 2)


def test_what_vanishes_in_a_file_is_refused(tmp_path: Path) -> None:
    folder = shutil.copytree(model_dir(), tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"top_p": 1e-45}))
    line = refusal(in_process("generate", QUESTION, "-m", folder), 3)
    assert "top_p" in line and "1.2e-38 to 1" in line
