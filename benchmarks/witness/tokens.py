"""The texts as ids of the first K tokens of the released tokenizer."""

from __future__ import annotations

import hashlib
import random
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from apertus_mlx.convert.vocabulary.byte_pairs import read_byte_pairs
from benchmarks.witness.texts import PARTS, prepare_texts, read_part
from tests.real_tokenizers import tekken_path, write_real_tokenizers

Ids = npt.NDArray[np.uint16]
# Of the released ones: its control tokens are the 8B's.
VERSION = "v1"
BEGIN, END = 1, 2
_SHUFFLE = 4_407


def prepare_tokens(folder: Path, vocab_size: int) -> Path:
    """`tokens-K` in `folder`: the tokenizer, and of each part ids by language; made once."""
    target = folder / f"tokens-{vocab_size}"
    partial = folder / f"tokens-{vocab_size}.partial"
    if target.exists():
        return target
    texts = prepare_texts(folder)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    (partial / "tokenizer.json").write_bytes(sliced_tokenizer(folder, vocab_size))
    tokenizer = Tokenizer.from_file(str(partial / "tokenizer.json"))
    for part in PARTS:
        languages = read_part(texts, part)
        found = {tag: encode(tokenizer, documents) for tag, documents in languages.items()}
        print(
            f"{part}: {sum(map(_size, found.values())):,} tokens in {len(found)} languages",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        if part == "training":
            every = [document for documents in found.values() for document in documents]
            random.Random(_SHUFFLE).shuffle(every)
            np.save(partial / f"{part}.npy", np.concatenate(every))
        else:
            arrays = {tag: np.concatenate(documents) for tag, documents in found.items()}
            np.savez(partial / f"{part}.npz", **arrays)  # type: ignore[arg-type]
    partial.rename(target)
    return target


def sliced_tokenizer(folder: Path, vocab_size: int) -> bytes:
    """The released `tokenizer.json` with its first `vocab_size` ids alone."""
    if tekken_path() is None:
        raise SystemExit("the tokenizer is built from mistral-common: pip install mistral-common")
    whole = folder / "tokenizer"
    write_real_tokenizers({VERSION: whole})
    pairs = read_byte_pairs(whole / "tokenizer.json")
    return pairs.cut(pairs.prefix(vocab_size))


def encode(tokenizer: Tokenizer, documents: Sequence[str]) -> list[Ids]:
    """Ids of each document between its begin and end; names of control tokens count as text."""
    tokenizer.encode_special_tokens = True
    return [
        np.array([BEGIN, *found.ids, END], np.uint16)
        for found in tokenizer.encode_batch(list(documents), add_special_tokens=False)
    ]


def fingerprint(ids: Ids) -> str:
    """SHA-256 of the ids."""
    return hashlib.sha256(ids.astype("<u2").tobytes()).hexdigest()


def _size(documents: Sequence[Ids]) -> int:
    return sum(map(len, documents))
