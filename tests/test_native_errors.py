"""Libraries in Rust panic over hostile files: a refusal in one line, and nothing else is caught."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from builders import config_4x, write_checkpoint

from apertus_mlx import native_errors
from apertus_mlx.config import read_config
from apertus_mlx.errors import RejectedError, UsageError
from apertus_mlx.safetensors_header import read_header
from apertus_mlx.tokenizer import Tokenizer
from convert.companions import check_companions

# With either the library gives up in the middle of a text and panics.
ENDLESS = {
    "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated",
                      "invert": False},
    "normalizer": {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "x"},
}  # fmt: skip


class PanicException(BaseException):
    """What Rust's libraries raise has this name, and a class of its own in each of them."""


@pytest.mark.parametrize("part", ENDLESS)
def test_patterns_without_end(part: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = write_checkpoint(tmp_path / "model", config_4x(num_hidden_layers=1))
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, part: ENDLESS[part]}))
    for read in (
        lambda: Tokenizer.load(folder, vocab_size=384, bos_token_id=1),
        lambda: check_companions(folder, read_config(folder)),
    ):
        with pytest.raises(RejectedError) as caught:
            read()
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_a_panic_over_a_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_checkpoint(tmp_path, config_4x(num_hidden_layers=1), tokenizer=False)

    def panic(*_: object, **__: object) -> None:
        raise PanicException("attempt to\nsubtract with overflow")

    monkeypatch.setattr("safetensors.safe_open", panic)
    with pytest.raises(RejectedError, match="attempt to subtract with overflow"):
        read_header(folder / "model.safetensors")


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError])
def test_what_is_no_fault_of_the_file_passes(error: type[BaseException]) -> None:
    with pytest.raises(error), native_errors.refused("a file"):
        raise error


def test_errors_of_ours_pass() -> None:
    with pytest.raises(UsageError), native_errors.refused("a file"):
        raise UsageError("no")


def test_only_a_panic_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    with native_errors.refused("a file"):
        os.write(2, b"a warning\n")
    with pytest.raises(RejectedError, match="a file \\(torn\\)"), native_errors.refused("a file"):
        os.write(2, b"a reason\n")
        raise ValueError("torn")
    with pytest.raises(RejectedError), native_errors.refused("a file"):
        os.write(2, b"thread '<unnamed>' panicked at \x1b[31m\n")
        raise PanicException("no")
    assert capfd.readouterr().err == "a warning\na reason\n"


def test_a_closed_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(_: int) -> int:
        raise OSError(9, "Bad file descriptor")

    monkeypatch.setattr(os, "dup", closed)
    with pytest.raises(RejectedError), native_errors.refused("a file"):
        raise PanicException("no")
