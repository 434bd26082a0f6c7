"""The same short text in more than a hundred languages, to find those that lose most.

No conversion calibrates on it. It is in nearly every training corpus: compare a model with its
reference on it, not models with each other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from apertus_mlx.convert.evaluation.texts import Document, TextSet, encode
from apertus_mlx.quant.metrics import Divergence
from apertus_mlx.system.model_files import read_own_file
from apertus_mlx.system.strict_json import parse_object
from apertus_mlx.text.tokenizer import Tokenizer

DATA = Path(__file__).with_name("languages.json")
NAME = "the same text in many languages"


@dataclass(frozen=True, slots=True)
class LanguageText:
    """A text with its language's name, and whose it is."""

    name: str
    text: str
    source: str
    licence: str


def language_texts() -> dict[str, LanguageText]:
    """The texts in the package by language tag."""
    data: Any = parse_object(read_own_file(DATA), str(DATA))
    return {
        tag: LanguageText(
            value["name"],
            value["text"],
            data["source"].replace("DOCUMENT", value["document"]),
            data["licence"],
        )
        for tag, value in data["languages"].items()
    }


def language_set() -> TextSet:
    """These texts as `measure_all` takes them."""
    documents = tuple(Document(tag, each.text) for tag, each in language_texts().items())
    digest = hashlib.sha256(read_own_file(DATA)).hexdigest()
    return TextSet(NAME, digest, documents, held_out=True)


def tokens_per_character(tokenizer: Tokenizer) -> dict[str, float]:
    """Tokens that a character (a code point) of each language takes on average."""
    return {
        tag: len(tokenizer.encode(each.text)) / len(each.text)
        for tag, each in language_texts().items()
    }


def text_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """Tokens of each language's text, the one counted with which a text starts."""
    return {each.language: len(encode(each, tokenizer, None)) for each in language_set().documents}


@dataclass(frozen=True, slots=True)
class LanguageLosses:
    """What a model lost by language.

    Attributes:
        ranked: tags, the one with the largest mean divergence first.
        median_kl: of the mean divergences of languages, in nats.
        median_tokens_per_character: likewise.
    """

    ranked: tuple[str, ...]
    median_kl: float
    median_tokens_per_character: float


def rank(
    languages: Mapping[str, tuple[Divergence, Divergence]], per_character: Mapping[str, float]
) -> LanguageLosses:
    """Rank languages by what they lost; `languages` is that of an `Evaluation`."""
    losses = {tag: found.kl_mean for tag, (found, _) in languages.items()}
    return LanguageLosses(
        tuple(sorted(losses, key=lambda tag: -losses[tag])),
        median(losses.values()),
        median(per_character[tag] for tag in losses),
    )
