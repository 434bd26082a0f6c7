"""`generation_config.json`: stop ids and the sampling that a model's makers recommend."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from apertus_mlx.config_keys import KeyReader
from apertus_mlx.model_files import exists
from apertus_mlx.strict_json import read_object

GENERATION_CONFIG_FILE = "generation_config.json"

# Keys that describe the file or repeat the config; they change nothing about a single sequence.
INERT_KEYS = frozenset(
    {
        "bos_token_id", "cache_implementation", "max_length", "max_new_tokens", "min_length",
        "output_attentions", "output_hidden_states", "pad_token_id", "return_dict_in_generate",
        "transformers_version", "use_cache",
    }
)  # fmt: skip


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
    values = read_object(path)
    keys = KeyReader(values, str(path))
    known = {
        "eos_token_id", "do_sample", "temperature", "top_p", "top_k", "min_p", "repetition_penalty"
    }  # fmt: skip
    ignored = [key for key in values if key not in known | INERT_KEYS and not key.startswith("_")]
    return GenerationConfig(
        eos_token_ids=keys.integers("eos_token_id", 0, vocab_size - 1),
        do_sample=keys.optional_boolean("do_sample"),
        temperature=keys.optional_number("temperature", -1e-9, 100.0),
        top_p=keys.optional_number("top_p", 0.0, 1.0),
        top_k=keys.optional_integer("top_k", 0, vocab_size),
        min_p=keys.optional_number("min_p", -1e-9, 1.0),
        repetition_penalty=keys.optional_number("repetition_penalty", 0.0, 100.0),
        ignored_keys=tuple(sorted(ignored)),
    )
