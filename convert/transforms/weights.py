"""A model's weights after rotation and smoothing; the model computes the same.

Matrices are read whole, since a rotated row depends on all rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from apertus_mlx.convert.evaluation.layerwise import ChangedWeights, SourceWeights, Weights
from apertus_mlx.convert.plan.plan import Plan
from apertus_mlx.convert.sources.reading import Reader
from apertus_mlx.convert.transforms.names import (
    DOWN,
    OUTPUT,
    SEED,
    VALUES,
    gives_to_matrix,
    norm_before,
    value_owners,
)
from apertus_mlx.convert.write.keep import load_arrays
from apertus_mlx.quant.arrays import Float32
from apertus_mlx.quant.transforms import balance, make_rotation

# What `Scaled.scales` are saved as, in the folder of calibrated codes.
SCALES = "scales.npz"


@dataclass(frozen=True, slots=True)
class Rotated(ChangedWeights):
    """Weights whose attention values are rotated, and the residual stream if the head is untied."""

    seed: int = SEED

    def matrix(self, path: str) -> Float32:
        """The weight of a module `[rows, columns]`."""
        weight = self.weights.matrix(path)
        if path.endswith((VALUES, OUTPUT)):
            weight = self._in_heads(path, weight)
        if self.config.tie_word_embeddings:
            return weight
        stream = make_rotation(self.config.hidden_size, self.seed)
        if path.endswith((OUTPUT, DOWN)):
            return stream.rows(weight)
        norm = norm_before(path)
        return stream.columns(weight if norm is None else weight * self.weights.vector(norm))

    def vector(self, name: str) -> Float32:
        """A norm's weight or a parameter of an activation."""
        vector = self.weights.vector(name)
        if self.config.tie_word_embeddings or not gives_to_matrix(name):
            return vector
        return np.ones_like(vector)

    def _in_heads(self, path: str, weight: Float32) -> Float32:
        """A layer's v or o, balanced and then rotated within each head."""
        layer = path.removesuffix(VALUES).removesuffix(OUTPUT)
        is_values = path.endswith(VALUES)
        other = self.weights.matrix(layer + (OUTPUT if is_values else VALUES))
        owners = value_owners(self.config)
        size = self.config.head_dim
        rotation = make_rotation(size, self.seed)
        if is_values:
            weight = weight / balance(weight, other, owners)[:, None]
            heads = weight.reshape(-1, size, weight.shape[1])
            return np.concatenate([rotation.rows(head) for head in heads])
        weight = weight * balance(other, weight, owners)[owners]
        return rotation.columns(weight.reshape(-1, size)).reshape(weight.shape)


@dataclass(frozen=True, slots=True)
class Scaled(ChangedWeights):
    """Weights with scaled columns; `scales` has the name of the norm or v before each matrix."""

    scales: Mapping[str, Float32]

    def matrix(self, path: str) -> Float32:
        """The weight of a module `[rows, columns]`."""
        weight = self.weights.matrix(path)
        norm = norm_before(path)
        if norm is not None and norm in self.scales:
            weight = weight * self.scales[norm]
        if path.endswith(VALUES) and path in self.scales:
            weight = weight / self.scales[path][:, None]
        if path.endswith(OUTPUT):
            values = path.removesuffix(OUTPUT) + VALUES
            if values in self.scales:
                weight = weight * self.scales[values][value_owners(self.config)]
        return weight

    def vector(self, name: str) -> Float32:
        """A norm's weight or a parameter of an activation."""
        vector = self.weights.vector(name)
        return vector / self.scales[name] if name in self.scales else vector


def unscaled_weights(plan: Plan, reader: Reader) -> Weights:
    """The weights to find scales for: the source's, rotated if `plan` says so."""
    weights = SourceWeights(plan.source, reader, plan.request.allow_nonfinite)
    return Rotated(weights) if plan.request.rotate else weights


def transformed_weights(plan: Plan, reader: Reader, folder: Path | None) -> Weights:
    """The weights that `plan` writes or quantizes; those of the source where it changes nothing.

    Args:
        plan: what is to be done.
        reader: of the source.
        folder: where the scales of `--smooth` lie (`calibrated.make_codes`).
    """
    weights = unscaled_weights(plan, reader)
    if not plan.request.smooth:
        return weights
    scales = None if folder is None else load_arrays(folder / SCALES)
    assert scales is not None
    return Scaled(weights, scales)
