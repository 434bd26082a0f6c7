"""bitsandbytes through transformers: its two forms, which `save_pretrained` keeps packed."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.neighbours.corpus import Case, Values
from benchmarks.neighbours.with_transformers import save_tokenizer

TOOL, PACKAGE = "bitsandbytes", "bitsandbytes"


def cases() -> list[Case]:
    """4 bits as QLoRA and Unsloth have them, and 8."""
    nf4 = {
        "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True
    }  # fmt: skip
    return [
        Case("load_in_4bit, nf4, save_pretrained", partial(saved, options=nf4)),
        Case("load_in_8bit, save_pretrained", partial(saved, options={"load_in_8bit": True})),
    ]


def saved(base: Path, folder: Path, options: dict[str, Any]) -> Values:
    """Nothing here reads the values, so none are returned."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    model = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=BitsAndBytesConfig(**options), device_map="cpu"
    )
    model.save_pretrained(folder)
    save_tokenizer(base, folder)
    return {}
