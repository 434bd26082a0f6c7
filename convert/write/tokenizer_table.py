"""The vocabulary as a table, beside `tokenizer.json`: a phone opens it in milliseconds."""

from __future__ import annotations

from pathlib import Path

from apertus_mlx.convert.write.copied_files import TOKENIZER
from apertus_mlx.errors import RejectedError
from apertus_mlx.text.token_table import FILE_NAME, TableError
from apertus_mlx.text.tokenizer_file import parse_backend, read_tokenizer_file
from apertus_mlx.text.vocabulary import LibraryVocabulary
from apertus_mlx.text.vocabulary_file import make_table


def write_tokenizer_table(directory: Path) -> None:
    """Write the table of `directory`'s tokenizer; none where it has a form that has no table."""
    path = directory / TOKENIZER
    data = read_tokenizer_file(path)
    try:
        table = make_table(path, data, LibraryVocabulary(parse_backend(path, data)))
    except (RejectedError, TableError):
        return
    (directory / FILE_NAME).write_bytes(table)
