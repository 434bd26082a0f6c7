"""Runs an Apertus model layer by layer in float32, holding the weights of one layer at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from apertus_mlx.backend.hardware import has_gpu
from apertus_mlx.checkpoint import layout
from apertus_mlx.checkpoint.config import ModelConfig
from apertus_mlx.checkpoint.matching import XIELU_DEFAULTS
from apertus_mlx.convert.evaluation.numpy_operations import compute_here
from apertus_mlx.convert.evaluation.products import Projection
from apertus_mlx.convert.evaluation.texts import Tokens
from apertus_mlx.convert.sources.reading import Reader, block_rows
from apertus_mlx.convert.sources.source import Source
from apertus_mlx.convert.write.keep import NOTHING, Keep
from apertus_mlx.model.apertus import DecoderLayer
from apertus_mlx.quant.affine import round_scales
from apertus_mlx.quant.arrays import Float32, blocks

# Tokens that go through a layer at once on a GPU; without one fewer are as quick.
BATCH_TOKENS, FEWER_TOKENS = 4096, 1024
# Logits that are held at once, and the fewest tokens whose product with a head is quick.
BLOCK_LOGITS, BLOCK_TOKENS = 1 << 21, 128


class Weights(Protocol):
    """Float32 weights of a model, read when they are asked for."""

    @property
    def config(self) -> ModelConfig:
        """The model's config."""

    def matrix(self, path: str) -> Float32:
        """The weight of a module `[rows, columns]`."""

    def vector(self, name: str) -> Float32:
        """A norm's weight or a parameter of an activation."""


@dataclass(frozen=True, slots=True)
class SourceWeights:
    """The weights of a recognised checkpoint."""

    source: Source
    reader: Reader
    # Whether NaN and infinity pass.
    allow_nonfinite: bool = False

    @property
    def config(self) -> ModelConfig:
        """The model's config."""
        return self.source.config

    def matrix(self, path: str) -> Float32:
        """The weight of a module, dequantized if need be; RejectedError where not finite."""
        found = self.source.matrices[path]
        shape = next(m for m in self.source.layout if m.path == path)
        weight = np.empty((shape.rows, shape.columns), np.float32)
        for rows in blocks(shape.rows, block_rows(4 * shape.columns)):
            values = found.read(self.reader, rows.start, rows.stop, self.allow_nonfinite)
            weight[rows] = np.array(values.astype(mx.float32))
        return weight

    def vector(self, name: str) -> Float32:
        """A norm's weight or a parameter of an activation, or what stands in for it."""
        tensor = self.source.vectors[name]
        if tensor is None:
            return np.array(XIELU_DEFAULTS[name.rsplit(".", 1)[-1]], np.float32)
        rows = tensor.shape[0] if tensor.shape else 1
        values = self.reader.floats(tensor, 0, rows, self.allow_nonfinite)
        return np.array(values.astype(mx.float32))


@dataclass(frozen=True, slots=True)
class ChangedWeights:
    """Weights of the same model with other values; by itself it changes none."""

    weights: Weights

    @property
    def config(self) -> ModelConfig:
        """The model's config."""
        return self.weights.config

    def matrix(self, path: str) -> Float32:
        """The weight of a module `[rows, columns]`."""
        return self.weights.matrix(path)

    def vector(self, name: str) -> Float32:
        """A norm's weight or a parameter of an activation."""
        return self.weights.vector(name)


def to_bfloat16(values: Float32) -> Float32:
    """Round to bfloat16; what a model computed in that type does after each product."""
    return np.asarray(round_scales(values, "BF16"))


class Layer:
    """One decoder layer whose four stages can be run apart.

    A stage is a set of matrices with one input: q, k and v; o; up; down.
    """

    STAGES = (
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.up_proj",),
        ("mlp.down_proj",),
    )

    def __init__(
        self, weights: Weights, index: int, finish: Callable[[Float32], Float32] | None = None
    ) -> None:
        self.path = layout.layer(index)
        self._module = module = DecoderLayer(weights.config)
        self.projections = {
            name: Projection(weights.matrix(f"{self.path}.{name}"), finish)
            for stage in self.STAGES
            for name in stage
        }
        parts: dict[str, Any] = dict(nn.Module.named_modules(module))
        for name, projection in self.projections.items():
            part, attribute = name.split(".")
            setattr(parts[part], attribute, projection)
        for name, _ in layout.vectors(weights.config):
            if name.startswith(f"{self.path}."):
                part, _, attribute = name.removeprefix(f"{self.path}.").rpartition(".")
                value = mx.array(weights.vector(name))
                setattr(parts[part], attribute, value.reshape(parts[part][attribute].shape))
        # Attention then ends with what o is given.
        parts["self_attn"].o_proj = nn.Identity()
        if has_gpu():
            module.mlp.act_fn.fuse(compiled=True)
        else:
            compute_here(module)
        self._activation: Callable[[mx.array], mx.array] = module.mlp.act_fn

    def stage_input(self, stage: int, residual: mx.array) -> mx.array:
        """What the matrices of a stage are given.

        Args:
            stage: index in `STAGES`.
            residual: the residual stream `[B, L, D]` before attention, for the last two after it.
        """
        module = self._module
        norm = module.attention_layernorm if stage < 2 else module.feedforward_layernorm
        x = mx.array(norm(residual))
        if stage == 1:
            return module.self_attn(x, "causal" if x.shape[1] > 1 else None, None)
        return self._activation(self.projections["mlp.up_proj"](x)) if stage == 3 else x

    def add(self, stage: int, residual: mx.array, inputs: mx.array | None = None) -> mx.array:
        """The residual stream after attention (stage 1) or the feed-forward part (stage 3).

        `inputs` are what `stage_input` gave, where they are still there.
        """
        name = self.STAGES[stage][0]
        if inputs is None:
            inputs = self.stage_input(stage, residual)
        return residual + self.projections[name](inputs)

    def __call__(self, residual: mx.array) -> mx.array:
        """The residual stream after this layer."""
        return self.add(3, self.add(1, residual))


def batches(windows: int, length: int, most: int | None = None) -> Iterator[slice]:
    """Windows that go through a layer at once: `most` tokens, or one window."""
    tokens = BATCH_TOKENS if has_gpu() else FEWER_TOKENS
    return blocks(windows, min(most or tokens, tokens) // length)


def logit_blocks(tokens: int, vocabulary: int) -> Iterator[slice]:
    """Tokens whose logits are held at once."""
    return blocks(tokens, max(BLOCK_LOGITS // vocabulary, BLOCK_TOKENS))


def run_layer(layer: Callable[[mx.array], mx.array], residual: Float32) -> None:
    """Replace `residual` `[windows, length, hidden]` by what follows, batch by batch."""
    for part in batches(*residual.shape[:2]):
        residual[part] = np.array(layer(mx.array(residual[part])))


def final_norm(weights: Weights, residual: Float32) -> None:
    """Replace `residual` by the hidden states that the head is given."""
    norm = nn.RMSNorm(weights.config.hidden_size, eps=weights.config.rms_norm_eps)
    norm.weight = mx.array(weights.vector(f"{layout.FINAL_NORM}.weight"))
    run_layer(norm, residual)


def hidden_states(
    weights: Weights,
    groups: Sequence[Tokens],
    finish: Callable[[Float32], Float32] | None = None,
    progress: Callable[[int], None] | None = None,
    keep: Keep = NOTHING,
) -> list[Float32]:
    """Final hidden states of several sets of windows, each set of one length.

    Args:
        weights: of the model.
        groups: token ids `[windows, length]`.
        finish: applied to every product with a weight and to the residual stream.
        progress: told the number of layers done.
        keep: where the streams are kept, at most once a minute and after the last layer; an
            interrupted run goes on from there.
    """
    found = keep.load()
    if found is None:
        embedding = weights.matrix(layout.EMBEDDING)
        first, residuals = 0, [embedding[windows] for windows in groups]
        del embedding
    else:
        first = int(found[0]["layers"])
        residuals = [found[1][str(number)] for number in range(len(groups))]
    depth = weights.config.num_hidden_layers
    for index in range(first, depth):
        layer = Layer(weights, index, finish)
        for residual in residuals:
            run_layer(layer, residual)
            if finish is not None:
                residual[:] = finish(residual)
        save = keep.save if index + 1 == depth else keep.reach
        save({"layers": index + 1}, {str(n): array for n, array in enumerate(residuals)})
        if progress is not None:
            progress(index + 1)
    for residual in residuals:
        final_norm(weights, residual)
    return residuals


def head_path(config: ModelConfig) -> str:
    """The module whose weight gives the logits."""
    return layout.EMBEDDING if config.tie_word_embeddings else layout.HEAD


def open_weights(directory: Path, reader: Reader) -> SourceWeights:
    """The weights of a checkpoint in any form that `convert` reads.

    Raises:
        NotFoundError, RejectedError: it is missing, damaged or not supported.
    """
    from apertus_mlx.checkpoint.config import read_config
    from apertus_mlx.checkpoint.slopes import check_slopes
    from apertus_mlx.checkpoint.tensors import open_checkpoint
    from apertus_mlx.convert.sources.recognise import recognise

    config = read_config(directory)
    checkpoint = open_checkpoint(directory)
    source = recognise(config, checkpoint.tensors, str(directory))
    check_slopes(checkpoint)
    return SourceWeights(source.settled(reader), reader)
