"""Texts with the ids that the tokenizers library gives them, by the embedded and the real files.

`tokenizers/NAME/tokenizer.json` is the file, `texts.json` beside it a list of `[text, ids]`. A
folder `NAME-table` is the same with the table beside it. A released file is there only where
`mistral-common` is installed, and that of v1 at night only: it has other names for a few tokens.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

from apertus_mlx.convert.vocabulary.byte_pairs import read_byte_pairs
from apertus_mlx.convert.write.tokenizer_table import write_tokenizer_table
from apertus_mlx.hub.demo import model_dir
from apertus_mlx.text.tokenizer_file import parse_backend, read_tokenizer_file
from tests.real_tokenizers import tekken_path, write_real_tokenizers
from tests.swift_fixtures.sizes import NIGHTLY, sized
from tests.text.test_real_tokenizers import SENTENCES, locale_texts

RANDOM_TEXTS = sized(5000, 600)
# Tokens that are kept of the embedded vocabulary in `cut`.
CUT = 1024
# Where letters, marks, digits, blanks and symbols of many scripts stand.
RANGES = ((0x20, 0x7F), (0x80, 0x250), (0x300, 0x370), (0x370, 0x700), (0x900, 0xE80),
          (0x1E00, 0x2100), (0x2000, 0x2070), (0x3000, 0x3100), (0x4E00, 0x5000),
          (0xAC00, 0xAD00), (0xFE00, 0xFFFE), (0x1F300, 0x1F700), (0x20, 0xD800))  # fmt: skip
WORDS = ["the", " The", " capital", "Zürich", "123", " 4.5", "\n", "\r\n", "  ", "\t", "\u0085",
         "\u00a0", "\u2028", "\u000b", "<s>", "<|assistant_end|>", "<SPECIAL_67>", "[INST]",
         "\\boxed{", "\\begin{", "don't", "I'll",
         "e\u0301", "🏔️", "👩‍👩‍👧", "ß", "ǅ", "ʰ", "१२"]  # fmt: skip


def write_tokenizer_fixtures(out: Path) -> None:
    """Write the folders described above."""
    folders = {"embedded": out / "tokenizers" / "embedded"}
    folders["embedded"].mkdir(parents=True, exist_ok=True)
    shutil.copy(model_dir() / "tokenizer.json", folders["embedded"])
    versions = ("v1", "v1.1") if NIGHTLY else ("v1.1",)
    folders["cut"] = out / "tokenizers" / "cut"
    folders["cut"].mkdir(parents=True, exist_ok=True)
    pairs = read_byte_pairs(model_dir() / "tokenizer.json")
    (folders["cut"] / "tokenizer.json").write_bytes(pairs.cut(pairs.prefix(CUT)))
    if tekken_path() is not None:
        real = {version: out / "tokenizers" / f"real-{version}" for version in versions}
        for folder in real.values():
            folder.mkdir(parents=True, exist_ok=True)
        write_real_tokenizers(real)
        folders |= {folder.name: folder for folder in real.values()}
    texts = list(_texts())
    for name, folder in folders.items():
        path = folder / "tokenizer.json"
        backend = parse_backend(path, read_tokenizer_file(path))
        batch = backend.encode_batch_fast(texts, add_special_tokens=False)
        pairs = [[text, encoding.ids] for text, encoding in zip(texts, batch, strict=True)]
        (folder / "texts.json").write_text(json.dumps(pairs, ensure_ascii=False), encoding="utf-8")
        with_table = folder.with_name(f"{name}-table")
        if NIGHTLY or name == "embedded":
            shutil.copytree(folder, with_table, dirs_exist_ok=True)
        else:
            folder.rename(with_table)  # JSON of this size takes long where nothing is optimized
        write_tokenizer_table(with_table)


def _texts() -> Iterator[str]:
    yield from SENTENCES
    yield from (text for _, text in list(locale_texts())[:: sized(1, 24)])
    rng = random.Random(0)
    for _ in range(RANDOM_TEXTS // 2):
        low, high = rng.choice(RANGES)
        codes = [rng.randrange(low, high) for _ in range(rng.choice((1, 2, 5, 20)))]
        yield "".join(map(chr, codes))
        yield "".join(rng.choice([*WORDS, chr(rng.choice(codes))]) for _ in range(rng.randrange(9)))
