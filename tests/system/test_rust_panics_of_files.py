"""Libraries in Rust panic over hostile files: refused in one line, whoever reads the file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers

from apertus_mlx.checkpoint.config import read_config
from apertus_mlx.checkpoint.header import read_header
from apertus_mlx.convert.write.copied_files import check_copied_files
from apertus_mlx.errors import RejectedError
from apertus_mlx.text.tokenizer import Tokenizer
from tests.builders import config_4x, write_checkpoint


class PanicException(BaseException):
    """As Rust's libraries raise it: past every handler of errors."""


READERS: dict[str, Callable[[Path], object]] = {
    "weights": lambda folder: read_header(folder / "model.safetensors"),
    "tokenizer": lambda folder: Tokenizer.load(folder, vocab_size=384, bos_token_id=1),
    "tokenizer that is converted": lambda folder: check_copied_files(folder, read_config(folder)),
}


@pytest.mark.parametrize(
    ("raised", "expected"),
    [(PanicException, RejectedError), (KeyboardInterrupt, KeyboardInterrupt)],
)
@pytest.mark.parametrize("reader", READERS)
def test_a_panic(
    reader: str,
    raised: type[BaseException],
    expected: type[BaseException],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = write_checkpoint(tmp_path, config_4x(num_hidden_layers=1))

    def panic(*_: object, **__: object) -> None:
        raise raised("attempt to subtract with overflow")

    monkeypatch.setattr("safetensors.safe_open", panic)
    panicking = SimpleNamespace(from_file=panic, from_buffer=panic)
    monkeypatch.setattr(tokenizers, "Tokenizer", panicking)
    with pytest.raises(expected, match="attempt to subtract with overflow"):
        READERS[reader](folder)
