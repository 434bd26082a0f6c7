"""Unsloth: its merge to 16 bits and its merge to 4."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from benchmarks.neighbours.corpus import Case, Values
from benchmarks.neighbours.with_transformers import values_of

TOOL, PACKAGE = "Unsloth", "unsloth"


def cases() -> list[Case]:
    """What its notebooks call at the end."""
    return [
        Case(f"save_pretrained_merged(save_method={method!r})", partial(merged, method=method))
        for method in ("merged_16bit", "merged_4bit_forced")
    ]


def merged(base: Path, folder: Path, method: str) -> Values:
    from unsloth import FastLanguageModel

    model, tokenizer = FastLanguageModel.from_pretrained(str(base), load_in_4bit=False)
    model = FastLanguageModel.get_peft_model(model, r=8)
    model.save_pretrained_merged(str(folder), tokenizer, save_method=method)
    return values_of(model) if method == "merged_16bit" else {}
