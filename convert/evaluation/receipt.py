"""What a finished folder says of its loss: on texts held out, and in each of many languages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from apertus_mlx.checkpoint.config import ModelConfig, read_config
from apertus_mlx.convert.evaluation import evaluate
from apertus_mlx.convert.evaluation.evaluate import Evaluation, measure
from apertus_mlx.convert.evaluation.languages import language_set, language_texts
from apertus_mlx.convert.evaluation.texts import TextSet

# Tokens of each of the languages: at most 5,520 of 115, which is what bounds the time.
TOKENS = 48
# A smaller vocabulary writes most languages byte by byte, and says nothing about them.
LEAST_VOCABULARY = 1 << 15
# Languages that the card names.
SHOWN = 10


@dataclass(frozen=True, slots=True)
class Receipt:
    """The loss on texts held out; that by language where the vocabulary has room for many."""

    held_out: Evaluation
    by_language: Evaluation | None = None

    @property
    def ranked(self) -> list[str]:
        """Tags of the languages, the one that lost most first."""
        if self.by_language is None:
            return []
        losses = {tag: found.kl_mean for tag, (found, _) in self.by_language.languages.items()}
        return sorted(losses, key=lambda tag: -losses[tag])

    @property
    def median_kl(self) -> float:
        """Of the languages, in nats."""
        assert self.by_language is not None
        return median(found.kl_mean for found, _ in self.by_language.languages.values())

    def as_json(self) -> dict[str, Any]:
        """For the manifest; divergences in nats."""
        if self.by_language is None:
            return self.held_out.as_json()
        own = {
            "median_kl": self.median_kl,
            "worst": self.ranked[:SHOWN],
            "tokens_per_language": TOKENS,
            **self.by_language.as_json(),
        }
        return {**self.held_out.as_json(), "by_language": own}


def measure_receipt(
    directory: Path,
    reference: Path,
    judged: TextSet,
    progress: Callable[[int, int], None],
    folder: Callable[[str], Path],
) -> Receipt:
    """Compare a finished model with its source.

    Args:
        directory: the model.
        reference: its source.
        judged: texts held out.
        progress: told runs through layers that are done, and of how many, for each of the two.
        folder: makes a folder of that name in which an interrupted measurement is kept.
    """
    held_out = measure(directory, reference, judged, progress=progress, folder=folder("held-out"))
    if read_config(directory).vocab_size < LEAST_VOCABULARY:
        return Receipt(held_out)
    texts = language_set()
    return Receipt(
        held_out, measure(directory, reference, texts, TOKENS, progress, folder("languages"))
    )


def kept_bytes(config: ModelConfig, texts: TextSet) -> int:
    """Most that it keeps: see `evaluate.kept_bytes`."""
    tokens = len(language_texts()) * TOKENS if config.vocab_size >= LEAST_VOCABULARY else 0
    return evaluate.kept_bytes(config, texts) + 4 * 4 * tokens * config.hidden_size
