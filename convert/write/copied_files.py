"""The files that are copied byte for byte from the source, and whether they fit the model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from apertus_mlx.checkpoint.config import ModelConfig
from apertus_mlx.checkpoint.config_keys import KeyReader
from apertus_mlx.errors import RejectedError
from apertus_mlx.system.model_files import (
    MAX_TEXT_BYTES,
    MAX_TOKENIZER_BYTES,
    checked,
    copy_file,
    exists,
    read_file,
)
from apertus_mlx.system.rust_panics import guarded
from apertus_mlx.system.strict_json import read_object

TOKENIZER = "tokenizer.json"
# An allow-list: code, weights of other formats and anything else are never copied.
COPIED = (
    TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
    "generation_config.json", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt",
    "USE_POLICY.md",
)  # fmt: skip


# What a cut vocabulary makes anew, and what would repeat the whole one.
OF_VOCABULARY = (TOKENIZER, "vocab.json", "merges.txt")


def copied_files(directory: Path, cuts_vocabulary: bool = False) -> Iterator[Path]:
    """The files of `directory` that go to the output as they are."""
    for name in COPIED:
        if cuts_vocabulary and name in OF_VOCABULARY:
            continue
        path = directory / name
        if exists(path):
            checked(path, _most_bytes(path))
            yield path


def check_copied_files(directory: Path, config: ModelConfig) -> None:
    """Refuse a tokenizer that is missing or cannot belong to the model.

    Raises:
        RejectedError: `tokenizer.json` is absent or damaged, or has ids that the embedding has not;
            `generation_config.json` names ids out of range.
    """
    path = directory / TOKENIZER
    if not exists(path):
        raise RejectedError(f"{directory}: no {TOKENIZER}; fetch the whole checkpoint")
    highest = _highest_id(path)
    if highest >= config.vocab_size:
        raise RejectedError(
            f"{path}: has token id {highest}, but the model has {config.vocab_size} (vocab_size)"
        )
    generation = directory / "generation_config.json"
    if exists(generation):
        keys = KeyReader(read_object(generation), str(generation))
        keys.integers("eos_token_id", 0, config.vocab_size - 1)
        keys.optional_integer("bos_token_id", 0, config.vocab_size - 1)
        keys.optional_integer("pad_token_id", 0, config.vocab_size - 1)


def copy_files(directory: Path, target: Path, cuts_vocabulary: bool = False) -> None:
    """Copy the files into `target`."""
    for path in copied_files(directory, cuts_vocabulary):
        copy_file(path, target / path.name, _most_bytes(path))


def _highest_id(path: Path) -> int:
    from tokenizers import Tokenizer

    data = read_file(path, MAX_TOKENIZER_BYTES)
    try:
        tokenizer = guarded(Tokenizer.from_buffer, data)
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - the library has no class of its own
        raise RejectedError(f"{path}: is not a tokenizer ({error})") from None
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    return max(vocabulary.values(), default=-1)


def _most_bytes(path: Path) -> int:
    return MAX_TOKENIZER_BYTES if path.name == TOKENIZER else MAX_TEXT_BYTES
