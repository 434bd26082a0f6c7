"""`generation_config.json`: stop ids and the sampling that a model's makers recommend."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from apertus_mlx.checkpoint.config_keys import KeyReader
from apertus_mlx.system.arguments import Range
from apertus_mlx.system.model_files import exists
from apertus_mlx.system.strict_json import read_object

GENERATION_CONFIG_FILE = "generation_config.json"

# Keys that describe the file or repeat the config; they change nothing about a single sequence.
INERT_KEYS = frozenset(
    {
        "bos_token_id", "cache_implementation", "max_length", "max_new_tokens", "min_length",
        "output_attentions", "output_hidden_states", "pad_token_id", "return_dict_in_generate",
        "transformers_version", "use_cache",
    }
)  # fmt: skip
# Sampling computes in float32. What is below its smallest normal number may count as 0 there, and
# with a penalty below 1e-20 a logit could become infinite.
SMALLEST_SHARE = 2.0**-126
SMALLEST_PENALTY, LARGEST_PENALTY = 1e-20, 100.0
LARGEST_TEMPERATURE = 100.0


RANGES = {
    "temperature": Range(0, LARGEST_TEMPERATURE),
    "top_p": Range(SMALLEST_SHARE, 1),
    "min_p": Range(SMALLEST_SHARE, 1, or_zero=True),
    "repetition_penalty": Range(SMALLEST_PENALTY, LARGEST_PENALTY),
}


@dataclass(frozen=True, slots=True)
class GenerationConfig:
    """What the file says; None where it says nothing."""

    eos_token_ids: tuple[int, ...] = ()
    do_sample: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    # Present, but not implemented here (beam search and the like).
    ignored_keys: tuple[str, ...] = ()


def read_generation_config(directory: Path, vocab_size: int) -> GenerationConfig:
    """Read the file in `directory`; an absent one says nothing.

    Raises:
        RejectedError: the file is damaged, or a value is out of range (ids: of the vocabulary).
    """
    path = directory / GENERATION_CONFIG_FILE
    if not exists(path):
        return GenerationConfig()
    keys = KeyReader(read_object(path), str(path))
    keys.ignore(INERT_KEYS)
    return GenerationConfig(
        eos_token_ids=keys.integers("eos_token_id", 0, vocab_size - 1),
        do_sample=keys.optional_boolean("do_sample"),
        top_k=keys.optional_integer("top_k", 0, vocab_size),
        **{key: _number(keys, key) for key in RANGES},
        ignored_keys=tuple(keys.unread()),
    )


def _number(keys: KeyReader, key: str) -> float | None:
    # Not to infinity, since a whole number may be larger than any float.
    value = keys.optional_number(key, -sys.float_info.max, sys.float_info.max)
    if value is not None and not RANGES[key].holds(value):
        raise keys.error(key, f"a number, {RANGES[key]}", value)
    return value
