"""Where a folder's vocabulary comes from: a table of it where there is one, else `tokenizer.json`.

A table stands beside the file, where `convert` has put it, or in the user's cache, where the first
one to read a large file leaves it. It counts only for the very file that it was made from; one that
does not, or is damaged, is as good as none.
"""

from __future__ import annotations

import json
import logging
import os
from hashlib import sha256
from pathlib import Path

from apertus_mlx.errors import ApertusError
from apertus_mlx.system.model_files import read_file, read_own_file
from apertus_mlx.system.user_folders import cache_folder
from apertus_mlx.system.whole_file import whole_file
from apertus_mlx.text.token_table import (
    FILE_NAME,
    MAX_TABLE_BYTES,
    TableError,
    build_table,
    read_table,
)
from apertus_mlx.text.tokenizer_file import (
    check_backend,
    parse_backend,
    read_tokenizer_file,
    with_text_unflagged,
)
from apertus_mlx.text.vocabulary import LibraryVocabulary, TableVocabulary, Vocabulary

# Smaller files are read sooner than a table is worth a file in the cache.
LARGE_FILE_BYTES = 2**20
# What tells two vocabularies apart, when a new table is compared with the library.
PROBE = "The 12 Zürich-trains'll leave\n\n  at 7:30\t(日本, हिन्दी, العربية) 🏔️ \r\n \\boxed{1} <s>"

_log = logging.getLogger(__name__)


def read_vocabulary(path: Path) -> Vocabulary:
    """Read the tokenizer file `path`, or its table.

    Raises:
        RejectedError: the file is missing, damaged, no byte-level BPE, or changes texts.
    """
    data = read_tokenizer_file(path)
    digest = sha256(data).digest()
    for find, read in ((_beside, read_file), (_cached, read_own_file)):
        try:
            return _opened(path, read(find(path, digest), MAX_TABLE_BYTES), digest)
        except (OSError, TableError, ApertusError) as error:
            _log.debug("%s: %s", path, error)
    vocabulary = LibraryVocabulary(parse_backend(path, data))
    if len(data) >= LARGE_FILE_BYTES:
        try:
            _keep_table(path, data, vocabulary)
        except (OSError, TableError, ApertusError) as error:
            _log.debug("%s: no table is kept: %s", path, error)
    return vocabulary


def _beside(path: Path, _: bytes) -> Path:
    return path.with_name(FILE_NAME)


def _cached(_: Path, digest: bytes) -> Path:
    return cache_folder() / "tokenizers" / f"{digest.hex()[:32]}.bin"


def _keep_table(path: Path, data: bytes, vocabulary: LibraryVocabulary) -> None:
    """Make a table and keep it in the cache, for the next to read the file."""
    cached = _cached(path, sha256(data).digest())
    cached.parent.mkdir(parents=True, exist_ok=True)
    # To make a table takes longer than to read the file: not each time where none can be kept.
    if not os.access(cached.parent, os.W_OK):
        raise PermissionError(f"{cached.parent}: cannot be written")
    table = make_table(path, data, vocabulary)
    with whole_file(cached, durable=False) as file:
        file.write_bytes(table)


def make_table(path: Path, data: bytes, vocabulary: LibraryVocabulary) -> bytes:
    """The table of the tokenizer file `path` with these bytes.

    Raises:
        TableError: it has none, or one that encodes otherwise than the library.
    """
    table = build_table(data, json.loads(with_text_unflagged(data)))
    opened = _opened(path, table, sha256(data).digest())
    if opened.encode(PROBE) != vocabulary.encode(PROBE) or opened.added != vocabulary.added:
        raise TableError("has no table: it would encode otherwise")
    return table


def _opened(path: Path, table: bytes, digest: bytes) -> TableVocabulary:
    opened = TableVocabulary(
        read_table(table, digest), lambda: parse_backend(path, read_tokenizer_file(path))
    )
    check_backend(path, opened.cutter)
    return opened
