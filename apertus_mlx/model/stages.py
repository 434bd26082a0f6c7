"""How a model is split over ranks that compute one after the other (pipeline parallelism).

Each rank has some layers, one after the other, and passes the residual stream on to the next. What
leaves the last one goes to all, so that each has the final norm and the head, and all know the
logits. The embedding is on the first rank alone, unless the head is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn

from apertus_mlx.cache import Cache
from apertus_mlx.checkpoint import layout
from apertus_mlx.checkpoint.config import ModelConfig
from apertus_mlx.checkpoint.inventory import Inventory, Part
from apertus_mlx.model.apertus import Decoder, DecoderLayer, Model, make_mask


class Links(Protocol):
    """A stage's connections to the others."""

    def from_before(self, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array | None:
        """What the stage before sends; None: there is none before."""

    def to_next(self, x: mx.array) -> mx.array:
        """Send `x` to the next stage; returns what the last one has to send, on all the same."""


def stage_of(inventory: Inventory, layers: range, rank: int, ranks: int) -> Inventory:
    """What rank `rank` of `ranks` holds of a checkpoint if these layers are its own."""

    def is_own(name: str) -> bool:
        number = layout.layer_of(name)
        if number is None:
            tied = inventory.config.tie_word_embeddings
            return rank == 0 or tied or not name.startswith(layout.EMBEDDING)
        return number in layers

    return replace(
        inventory,
        config=replace(inventory.config, num_hidden_layers=len(layers)),
        matrices={path: each for path, each in inventory.matrices.items() if is_own(path)},
        vectors={name: each for name, each in inventory.vectors.items() if is_own(name)},
        part=Part(rank, ranks, layers),
    )


class Stage(Decoder):
    """Some of a decoder's layers; `config` is that of the part. The layers keep their numbers."""

    def __init__(self, config: ModelConfig, part: Part, links: Links) -> None:
        super().__init__(config)
        assert part.layers is not None
        absent: list[Any] = [nn.Module() for _ in range(part.layers.start)]
        self.layers = absent + self.layers
        self._first = part.layers.start
        if part.rank and not config.tie_word_embeddings:
            self.embed_tokens = nn.Module()
        self._links = links

    def __call__(self, inputs: mx.array, cache: Sequence[Cache | None] | None = None) -> mx.array:
        """Final hidden states `[B, L, D]` of the ids `inputs` `[B, L]`, on all ranks the same."""
        layers = self.layers[self._first :]
        caches = cache if cache is not None else [None] * len(layers)
        # All of it in the order in which this program asks, which is the same on all ranks.
        mx.async_eval(inputs)
        shape = (*inputs.shape, self.norm.weight.size)
        x = self._links.from_before(shape, self.norm.weight.dtype)
        if x is None:
            x = self.embed_tokens(inputs)
        mask = make_mask(inputs.shape[1], caches[0])
        for layer, layer_cache in zip(layers, caches, strict=True):
            x = layer(x, mask, layer_cache)
        hidden: mx.array = self.norm(self._links.to_next(x))
        # The next rank waits for it, though nobody here may want to know any logits.
        mx.async_eval(hidden)
        return hidden


class StagedModel(Model):
    """A model of which each rank computes some layers."""

    def __init__(self, config: ModelConfig, part: Part, links: Links) -> None:
        super().__init__(config)
        self.model = Stage(config, part, links)

    @property
    def layers(self) -> list[DecoderLayer]:
        """The layers of this rank."""
        return [layer for layer in self.model.layers if isinstance(layer, DecoderLayer)]
