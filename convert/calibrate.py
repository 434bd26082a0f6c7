"""Quantizes a model layer by layer, each on what the quantized layers before it really deliver.

Two residual streams run side by side: of the original and of the model as quantized so far. A matrix
is fitted to give, from the inputs of the second, what the original gave from those of the first.
Memory holds one layer, its second moments and the two streams.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import mlx.core as mx
import numpy as np

from apertus_mlx import layout
from convert.layerwise import (
    Array,
    Layer,
    Tokens,
    Weights,
    batches,
    embed,
    final_norm,
    hidden_states,
)
from quant import descent, gptq, search
from quant.affine import AffineCodes, ScaleType, dequantize
from quant.spec import QuantSpec

Method = Literal["rtn", "search", "gptq"]
# How much of the difference between the two streams a matrix is asked to make up for. All of it
# fits the calibration text too closely.
CORRECTION = 0.5
# Of a tied embedding: the share of the objective that is plain error of the rows, which is what
# matters to the first layer; the rest is error of the logits.
ROW_SHARE = 0.3


@dataclass(slots=True)
class Moments:
    """Sums over tokens of what the inputs of one stage have in common."""

    second: Array
    # Of the original's input minus the quantized model's, times the latter.
    cross: Array
    tokens: int = 0

    @classmethod
    def empty(cls, columns: int) -> Moments:
        """Nothing seen yet."""
        return cls(
            np.zeros((columns, columns), np.float32), np.zeros((columns, columns), np.float32)
        )

    def add(self, original: mx.array, quantized: mx.array) -> None:
        """Count inputs `[B, L, columns]` of the two streams."""
        columns = len(self.second)
        found = np.array(quantized, copy=False).reshape(-1, columns)
        wanted = np.array(original, copy=False).reshape(-1, columns)
        self.second += found.T @ found
        self.cross += (wanted - found).T @ found
        self.tokens += len(found)


def quantize_model(
    weights: Weights,
    specs: Mapping[str, QuantSpec],
    windows: Tokens,
    scale_type: ScaleType = "BF16",
    progress: Callable[[int], None] | None = None,
    *,
    correction: float = CORRECTION,
    row_share: float = ROW_SHARE,
) -> Iterator[tuple[str, AffineCodes]]:
    """Codes of the matrices in `specs`, in the order embedding, layers, head.

    Args:
        weights: the original.
        specs: affine formats by module path; modules without one stay as they are.
        windows: calibration tokens `[windows, length]`.
        scale_type: what scales and biases will be stored in.
        progress: told how many of `passes(config)` steps are done.
        correction: see `CORRECTION`.
        row_share: see `ROW_SHARE`.
    """
    config = weights.config
    report = progress or (lambda _: None)
    embedding = weights.matrix(layout.EMBEDDING)
    original = embed(embedding, windows)
    if layout.EMBEDDING in specs:
        spec = specs[layout.EMBEDDING]
        if config.tie_word_embeddings:
            hidden = hidden_states(weights, [windows], progress=report)[0]
            head = hidden.reshape(-1, hidden.shape[-1])
            codes = _fit_tied(embedding, spec, head.T @ head, scale_type, row_share)
            del hidden, head
        else:
            codes = search.fit(embedding, spec, None, scale_type)
        embedding = dequantize(codes)
        yield layout.EMBEDDING, codes
    quantized = embed(embedding, windows)
    del embedding
    for index in range(config.num_hidden_layers):
        yield from _quantize_layer(
            Layer(weights, index), Layer(weights, index), specs, original, quantized,
            scale_type, correction,
        )  # fmt: skip
        report(config.num_hidden_layers + index + 1)
    if layout.HEAD in specs and not config.tie_word_embeddings:
        final_norm(weights, original)
        final_norm(weights, quantized)
        moments = Moments.empty(config.hidden_size)
        for part in batches(*windows.shape):
            moments.add(mx.array(original[part]), mx.array(quantized[part]))
        head_weight = weights.matrix(layout.HEAD)
        yield layout.HEAD, fit(head_weight, specs[layout.HEAD], moments, scale_type, correction)


def passes(weights: Weights) -> int:
    """What `progress` counts up to."""
    return 2 * weights.config.num_hidden_layers


def fit(
    weight: Array,
    spec: QuantSpec,
    moments: Moments,
    scale_type: ScaleType,
    correction: float,
) -> AffineCodes:
    """The best codes known for one matrix and the inputs it will have."""
    second = gptq.damped(moments.second)
    target = weight
    if correction:
        # Least squares of the original's outputs on the quantized model's inputs.
        mean = max(float(np.diag(moments.second).mean()), 1e-30)
        shift = np.linalg.solve(second, moments.cross.T.astype(np.float64) / mean)
        target = weight + correction * (weight @ shift.T.astype(np.float32))
    start = gptq.fit(target, spec, second, scale_type, damping=0.0)
    return descent.improve(target, start, second, scale_type)


def _fit_tied(
    weight: Array, spec: QuantSpec, head_moments: Array, scale_type: ScaleType, row_share: float
) -> AffineCodes:
    second = (1 - row_share) * gptq.damped(head_moments) + row_share * np.eye(len(head_moments))
    start = gptq.fit(weight, spec, second, scale_type, damping=0.0)
    return descent.improve(weight, start, second, scale_type)


def _quantize_layer(
    before: Layer,
    after: Layer,
    specs: Mapping[str, QuantSpec],
    original: Array,
    quantized: Array,
    scale_type: ScaleType,
    correction: float,
) -> Iterator[tuple[str, AffineCodes]]:
    """Quantize the stages of a layer in turn; both streams end up behind it."""
    streams = ((before, original), (after, quantized))
    parts = list(batches(*original.shape[:2]))

    def settle(stage: int, moments: Moments) -> Iterator[tuple[str, AffineCodes]]:
        for name in Layer.STAGES[stage]:
            path = f"{after.path}.{name}"
            if path in specs:
                weight = after.projections[name].weight
                codes = fit(weight, specs[path], moments, scale_type, correction)
                after.projections[name].weight = dequantize(codes)
                yield path, codes

    moments = Moments.empty(original.shape[-1])
    for part in parts:
        moments.add(*(layer.attention_input(mx.array(x[part])) for layer, x in streams))
    yield from settle(0, moments)

    columns = after.projections["self_attn.o_proj"].weight.shape[1]
    mixed = [np.empty((*original.shape[:2], columns), np.float32) for _ in streams]
    moments = Moments.empty(columns)
    for part in parts:
        inputs = [
            layer.mixed_values(layer.attention_input(mx.array(x[part]))) for layer, x in streams
        ]
        moments.add(*inputs)
        for store, values in zip(mixed, inputs, strict=True):
            store[part] = np.array(values)
    yield from settle(1, moments)

    moments = Moments.empty(original.shape[-1])
    for part in parts:
        for (layer, x), values in zip(streams, mixed, strict=True):
            x[part] += np.array(layer.projections["self_attn.o_proj"](mx.array(values[part])))
        moments.add(*(layer.up_input(mx.array(x[part])) for layer, x in streams))
    del mixed
    yield from settle(2, moments)

    moments = Moments.empty(after.projections["mlp.down_proj"].weight.shape[1])
    for part in parts:
        moments.add(*(layer.down_input(layer.up_input(mx.array(x[part]))) for layer, x in streams))
    yield from settle(3, moments)
    for part in parts:
        for layer, x in streams:
            inner = layer.down_input(layer.up_input(mx.array(x[part])))
            x[part] += np.array(layer.projections["mlp.down_proj"](inner))
