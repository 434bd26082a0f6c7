"""A model of which each rank computes a share of every layer (tensor parallelism).

What reads the residual stream is split by rows, what writes to it by columns, and the ranks' shares
of what is written are summed. So is a row of the embedding, which one rank has and the others take
for zeros. Of the logits each rank computes those of its own token ids.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from apertus_mlx.cache import Cache
from apertus_mlx.checkpoint.config import ModelConfig
from apertus_mlx.checkpoint.inventory import Part
from apertus_mlx.model.apertus import Model
from apertus_mlx.model.language_model import NextTokenLogits
from apertus_mlx.model.split import COLUMNS, axis_of, own_ids


class Exchange(Protocol):
    """What ranks exchange; every rank has to ask for it, in the same order."""

    def sum(self, x: mx.array) -> mx.array:
        """The sum of `x` over all ranks."""

    def gather(self, x: mx.array) -> mx.array:
        """All ranks' `x` `[N, ...]`, one after the other: `[ranks * N, ...]`."""


class SummedLinear(nn.Module):
    """A product of which each rank computes a share: the sum over all ranks."""

    def __init__(self, linear: nn.Module, summed: Callable[[mx.array], mx.array]) -> None:
        super().__init__()
        self.linear = linear
        self._summed = summed

    def __call__(self, x: mx.array) -> mx.array:
        """Apply to this rank's `x` `[..., in / ranks]`; returns `[..., out]`, on all the same."""
        return self._summed(self.linear(x))


class SummedEmbedding(nn.Module):
    """An embedding of which each rank has the rows of some ids, those from `first` on."""

    def __init__(
        self, embedding: nn.Module, first: int, summed: Callable[[mx.array], mx.array]
    ) -> None:
        super().__init__()
        self.embedding = embedding
        self._first, self._summed = first, summed
        self._last = embedding.weight.shape[0] - 1

    def __call__(self, ids: mx.array) -> mx.array:
        """Rows `[..., D]` of the token ids, on all ranks the same."""
        own = ids.astype(mx.int32) - self._first
        inside = mx.clip(own, 0, self._last)
        rows = self.embedding(inside)
        return self._summed(mx.where((own == inside)[..., None], rows, mx.zeros_like(rows)))

    def as_linear(self, x: mx.array) -> mx.array:
        """Logits `[..., ids of this rank]` of hidden states `[..., D]`."""
        logits: mx.array = self.embedding.as_linear(x)
        return logits


class SplitModel(Model):
    """A model made of one rank's part; `share` it once its weights are final."""

    def __init__(self, config: ModelConfig, part: Part, exchange: Exchange) -> None:
        super().__init__(config)
        self._rank, self._exchange = part.rank, exchange
        ids, outputs = (
            own_ids(count, part.ranks) for count in (config.vocab_size, config.output_vocab_size)
        )
        self._own_ids, self._own_outputs = ids, ids if config.tie_word_embeddings else outputs
        self.model.embed_tokens = nn.Embedding(ids, config.hidden_size)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, outputs, bias=False)
        self._led: Callable[[mx.array], mx.array] | None = None

    def share(self) -> None:
        """Add from now on what the others compute."""
        replaced: list[tuple[str, nn.Module]] = [
            (path, SummedLinear(module, self._exchange.sum))
            for path, module in self.named_modules()
            if axis_of(path) == COLUMNS
        ]
        self.update_modules(tree_unflatten(replaced))
        if self._own_ids < self.config.vocab_size:
            embedding, first = self.model.embed_tokens, self._rank * self._own_ids
            self.model.embed_tokens = SummedEmbedding(embedding, first, self._exchange.sum)

    @property
    def shares_head(self) -> bool:
        """Whether this rank computes the logits of some token ids only."""
        return self._own_outputs < self.config.output_vocab_size

    def ask(self, logits: Callable[[mx.array], mx.array]) -> None:
        """Get all logits by `logits` from now on, which has the others compute `gathered`, too."""
        self._led = logits

    def logits(self, hidden: mx.array) -> mx.array:
        """Logits `[B, L, vocabulary]` of hidden states `[B, L, D]`, on all ranks the same."""
        return self.gathered(hidden) if self._led is None else self._led(hidden)

    def gathered(self, hidden: mx.array) -> mx.array:
        """See `logits`: each rank's own, one after the other; every rank has to ask for them."""
        return self._joined(super().logits(hidden))

    def next_token_logits(
        self, inputs: mx.array, cache: Sequence[Cache | None] | None = None
    ) -> NextTokenLogits:
        """Logits of the token after the last of `inputs` `[1, L]`.

        Where nobody looks at them, the ranks exchange no more than each one's best.
        """
        if not self.shares_head or self._led is not None:
            return super().next_token_logits(inputs, cache)
        own = super().logits(self.model(inputs, cache)[:, -1:])
        return NextTokenLogits(self._joined(own)[0, 0], self._best(own[0, 0]))

    def _joined(self, own: mx.array) -> mx.array:
        """All logits `[B, L, vocabulary]`, of this rank's `[B, L, own ids]`."""
        if not self.shares_head:
            return own
        parts = self._exchange.gather(own[None])
        return mx.moveaxis(parts, 0, 2).reshape(*own.shape[:2], -1)

    def _best(self, own: mx.array) -> mx.array:
        """The id of the largest of all logits, of this rank's `[own ids]`; of equals the first."""
        best = mx.argmax(own, keepdims=True)
        found = mx.concatenate([
            own[best].astype(mx.float32).view(mx.uint32),
            best + self._rank * self._own_outputs,
        ])  # fmt: skip
        every = self._exchange.gather(found[None])
        return every[mx.argmax(every[:, 0].view(mx.float32)), 1]
