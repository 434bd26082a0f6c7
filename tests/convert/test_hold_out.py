"""Texts to calibrate on and texts to judge by: nothing is in both, whatever the files look like."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from apertus_mlx.convert.evaluation.texts import (
    Document,
    TextSet,
    hold_out,
    read_texts,
    sample_windows,
)
from apertus_mlx.text.tokenizer import Tokenizer
from tests.builders import config_4x, write_checkpoint

LINES = [f"Sentence number {n} is about topic {n * n}." for n in range(300)]
PAIRS = [f"{a}\n{b}" for a in LINES[:9] for b in LINES[:9]]
WINDOW = 24


def jsonl(texts: list[str]) -> str:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


FILES = {
    "a paragraph a line.jsonl": jsonl(LINES),
    "three long documents.jsonl": jsonl(["\n\n".join(LINES[n::3]) for n in range(3)]),
    "without blank lines.txt": "\n".join(LINES),
    "paragraphs.txt": "\n\n".join(LINES),
    "one line.txt": " ".join(LINES),
    "neither lines nor sentences.txt": " ".join(f"word{n}" for n in range(2000)),
    "every document twice.jsonl": jsonl(LINES + LINES[::-1]),
    "white space differs.jsonl": jsonl(LINES + [f"  {line} \n" for line in LINES]),
    "paragraphs of other documents.jsonl": jsonl(PAIRS),
    "two.txt": "One paragraph of so many words.\n\nAnd another one beside it.",
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_no_window_of_tokens_is_in_both(tmp_path: Path, name: str) -> None:
    model = write_checkpoint(tmp_path / "model", config_4x())
    tokenizer = Tokenizer.load(model, vocab_size=384, bos_token_id=1)
    path = tmp_path / name
    path.write_text(FILES[name])
    seen, judged = hold_out(read_texts([path]))
    assert judged.held_out and not seen.held_out and judged.name.endswith(", held out")
    windows: list[set[bytes]] = []
    for texts in (seen, judged):
        ids = [
            id_
            for document in texts.documents
            for id_ in [-1, *tokenizer.encode(" ".join(str(document.content).split())), -1]
        ]
        every = np.lib.stride_tricks.sliding_window_view(np.array(ids), WINDOW)
        windows.append({row.tobytes() for row in every if -1 not in row})
    assert windows[0] and not windows[0] & windows[1]
    assert sample_windows(judged, tokenizer, None, 16, 4, 0).windows.size


def test_a_part_near_a_quarter_is_held_out() -> None:
    for name in ("a paragraph a line", "without blank lines", "one line"):
        text = FILES[f"{name}.jsonl" if "paragraph" in name else f"{name}.txt"]
        lines = text.splitlines() if "paragraph" in name else [text]
        texts = TextSet("x", "", tuple(Document("en", line) for line in lines))
        sizes = [sum(len(str(d.content)) for d in part.documents) for part in hold_out(texts)]
        assert 0.2 < sizes[1] / sum(sizes) < 0.3
        assert hold_out(texts) == hold_out(texts)


def test_one_text_under_two_labels_is_on_one_side() -> None:
    documents = [Document(language, line) for language in ("en", "und") for line in LINES[:50]]
    seen, judged = hold_out(TextSet("x", "", tuple(documents)))
    assert not {d.content for d in seen.documents} & {d.content for d in judged.documents}
    assert len(seen.documents) + len(judged.documents) == 50


@pytest.mark.parametrize("text", ["a", "One paragraph.", "a" * 5000, "The same again. " * 500])
def test_too_short_is_said(text: str) -> None:
    texts = TextSet("en.txt", "", (Document("en", text),))
    seen, judged = hold_out(texts)
    assert seen.documents == judged.documents == texts.documents
    assert not judged.held_out
    assert judged.name == "en.txt, which it was made with: too short to hold a part out"
