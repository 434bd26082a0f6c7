"""What decoding, chat and evaluation ask of a model, whatever computes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx

from apertus_mlx.cache import FULL_PRECISION, Cache, CacheConfig
from apertus_mlx.checkpoint.config import ModelConfig


@dataclass(frozen=True, slots=True)
class NextTokenLogits:
    """Logits of the next token, with what the same pass may have found out about them.

    `best` and `peaks` save a second look at 131,072 logits; a model may leave both out.
    """

    # `[vocabulary]`.
    values: mx.array
    # The token of the largest logit, shape `[]`.
    best: mx.array | None = None
    # The largest logit of each run of `vocabulary / len(peaks)` tokens.
    peaks: mx.array | None = None


class LanguageModel(Protocol):
    """A model on any hardware."""

    @property
    def config(self) -> ModelConfig:
        """The configuration it was made from."""

    @property
    def arithmetic(self) -> str:
        """In words, what its numbers depend on beside the checkpoint, by more than rounding."""

    @property
    def model(self) -> Callable[..., mx.array]:
        """From token ids `[B, L]` and caches to final hidden states `[B, L, D]`."""

    @property
    def layers(self) -> Sized:
        """The decoder layers."""

    @property
    def on_gpu(self) -> bool:
        """Whether MLX's GPU computes it."""

    def __call__(self, inputs: mx.array, cache: Sequence[Cache | None] | None = None) -> mx.array:
        """Logits `[B, L, vocabulary]` of the token ids `inputs` `[B, L]`."""

    def logits(self, hidden: mx.array) -> mx.array:
        """Logits `[B, L, vocabulary]` of final hidden states `[B, L, D]`."""

    def next_token_logits(
        self, inputs: mx.array, cache: Sequence[Cache | None] | None = None
    ) -> NextTokenLogits:
        """Logits of the token after the last of `inputs` `[1, L]`."""

    def make_cache(self, form: CacheConfig = FULL_PRECISION) -> list[Cache]:
        """An empty cache of this form for each layer."""
