"""Answers that a model is made to give: texts in which `⟨71⟩` is an id, drawn one after another."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest

from apertus_mlx.generation import run as module
from apertus_mlx.text.tokenizer import Tokenizer


def as_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text in which `⟨71⟩` is one."""
    ids: list[int] = []
    for index, part in enumerate(text.replace("⟩", "⟨").split("⟨")):
        ids += [int(part)] if index % 2 else tokenizer.encode(part)
    return ids


def as_text(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The reverse of `as_ids`."""
    return "".join(tokenizer.decode([each]) or f"⟨{each}⟩" for each in ids)


def script_answers(
    monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer, *texts: str, interrupt_after: int = -1
) -> None:
    """Make runs draw `texts`, one each; the first is interrupted behind so many tokens."""
    left = iter(texts)
    stops = iter([interrupt_after])

    def draw(step: Any, logits: Any, sampler: Any, limit: int, *_: Any) -> Iterator[int]:
        stop = next(stops, -1)
        for index, token in enumerate(itertools.islice(as_ids(tokenizer, next(left)), limit)):
            if index == stop:
                raise KeyboardInterrupt
            yield token

    monkeypatch.setattr(module, "draw_tokens", draw)
