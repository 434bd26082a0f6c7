"""Quantizes a model layer by layer, each on what the quantized layers before it really deliver.

Two residual streams run side by side: of the original and of the model as quantized so far. A
matrix is fitted so that its outputs on the second stream match the original's outputs on the
first. Memory holds one layer, its second moments and the two streams.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np

from apertus_mlx.checkpoint import layout
from apertus_mlx.checkpoint.config import ModelConfig
from apertus_mlx.convert.calibration.fitting import Moments, Objective, fit
from apertus_mlx.convert.evaluation.layerwise import (
    Layer,
    Weights,
    batches,
    final_norm,
    head_path,
    hidden_states,
    logit_blocks,
    run_layer,
)
from apertus_mlx.convert.evaluation.products import gram, quickest
from apertus_mlx.convert.evaluation.texts import Tokens
from apertus_mlx.convert.write.keep import Keep
from apertus_mlx.quant.affine import AffineCodes, ScaleType, dequantize
from apertus_mlx.quant.arrays import Float32, Float64, exponentials, row_dots
from apertus_mlx.quant.curvature import Curvature, damped
from apertus_mlx.quant.spec import QuantSpec

# How much of the difference between the two streams a matrix is asked to make up for. All of it
# fits the calibration text too closely.
CORRECTION = 0.5
# Of a tied embedding: the share of the objective that is its use as an embedding; the rest is its
# use as the head.
ROW_SHARE = 0.6
# What is kept of the first pass, and of the second.
AHEAD, STREAMS = "ahead.npz", "streams.npz"
STREAM_NAMES = ("original", "quantized", "uncertainty")


def quantize_model(
    weights: Weights,
    specs: Mapping[str, QuantSpec],
    windows: Tokens,
    scale_type: ScaleType = "BF16",
    progress: Callable[[int], None] | None = None,
    *,
    correction: float = CORRECTION,
    row_share: float = ROW_SHARE,
    folder: Path | None = None,
) -> Iterator[tuple[str, AffineCodes]]:
    """Codes of the matrices in `specs`, in the order embedding, layers, head.

    An interrupted run goes on after the last step whose codes were all taken: a layer of the first
    pass, the embedding, a layer, the head. That is the last one if it took a minute, else one less
    than a minute earlier; codes of what came before it do not come again.

    Args:
        weights: the original.
        specs: affine formats by module path; modules without one stay as they are.
        windows: calibration tokens `[windows, length]`.
        scale_type: what scales and biases will be stored in.
        progress: told runs through layers that are done, of twice as many as there are layers.
        correction: see `CORRECTION`.
        row_share: see `ROW_SHARE`.
        folder: where the streams are kept, at most once a minute; None keeps nothing.
    """
    config = weights.config
    report = progress or (lambda _: None)
    ahead, streams = (
        Keep(folder / name if folder is not None else None) for name in (AHEAD, STREAMS)
    )
    found = streams.load()
    if found is None:
        begun = yield from _begin(
            weights, specs.get(layout.EMBEDDING), windows, scale_type, report, row_share, ahead
        )
        done, arrays = 0, dict(zip(STREAM_NAMES, begun, strict=True))
        streams.save({"layers": 0}, arrays)
    else:
        done, arrays = int(found[0]["layers"]), found[1]
    original, quantized, uncertainty = (arrays[name] for name in STREAM_NAMES)
    ahead.discard()
    for index in range(done, config.num_hidden_layers):
        yield from _quantize_layer(
            Layer(weights, index), Layer(weights, index), specs, original, quantized,
            scale_type, correction,
        )  # fmt: skip
        streams.reach({"layers": index + 1}, arrays)
        report(config.num_hidden_layers + index + 1)
    if layout.HEAD in specs and not config.tie_word_embeddings:
        final_norm(weights, original)
        final_norm(weights, quantized)
        head = weights.matrix(layout.HEAD)
        moments = Moments(head)
        for part in batches(*windows.shape):
            root = np.sqrt(uncertainty[part])[..., None]
            moments.add(mx.array(original[part] * root), mx.array(quantized[part] * root))
        objective = Objective.of(moments, correction)
        yield layout.HEAD, fit(head, specs[layout.HEAD], objective, scale_type)


def kept_bytes(config: ModelConfig, tokens: int) -> int:
    """Most that `quantize_model` keeps on disk: two streams, and the two that replace them."""
    return 4 * tokens * (4 * config.hidden_size + 2)


def _begin(
    weights: Weights,
    spec: QuantSpec | None,
    windows: Tokens,
    scale_type: ScaleType,
    report: Callable[[int], None],
    row_share: float,
    ahead: Keep,
) -> Generator[tuple[str, AffineCodes], None, tuple[Float32, Float32, Float32]]:
    """Codes of the embedding, if it has a format; returns both streams and the uncertainty."""
    config = weights.config
    hidden = hidden_states(weights, [windows], progress=report, keep=ahead)[0]
    # Head and embedding are the largest matrices, so one of them is held at a time.
    table = weights.matrix(head_path(config))
    uncertainty = _uncertainty(hidden, table)
    second = None if spec is None else _reader_moments(weights, table)
    if not config.tie_word_embeddings:
        del table
        table = weights.matrix(layout.EMBEDDING)
    original = table[windows]
    if spec is None or second is None:
        return original, original.copy(), uncertainty
    if config.tie_word_embeddings:
        inputs = hidden.reshape(-1, hidden.shape[-1]) * np.sqrt(uncertainty).reshape(-1, 1)
        second = row_share * second + (1 - row_share) * damped(np.array(gram(inputs)))
        del inputs
    # Each term is damped already.
    objective = Objective(Curvature.of(quickest(second.astype(np.float32)), damping=0.0))
    codes = fit(table, spec, objective, scale_type)
    del table
    yield layout.EMBEDDING, codes
    rows, places = np.unique(windows, return_inverse=True)
    return original, dequantize(codes.rows(rows))[places.reshape(windows.shape)], uncertainty


def _uncertainty(hidden: Float32, head: Float32) -> Float32:
    """For each token how much an error of its logits can change the prediction, of mean one.

    The divergence grows with the variance of the error under the prediction, which is small where
    one token has it all; the sum of p (1 - p) stands for it. Shape `[windows, length]`.
    """
    rows, table = hidden.reshape(-1, hidden.shape[-1]), quickest(head)
    spread = np.empty(len(rows), np.float32)
    for part in logit_blocks(len(rows), len(head)):
        logits = quickest(rows[part]) @ table.T
        logits -= logits.max(-1, keepdims=True)
        shares = exponentials(logits)
        shares /= shares.sum(-1, keepdims=True)
        spread[part] = 1 - np.array(row_dots(shares, shares))
    spread = np.maximum(spread, 0) + np.float32(1e-3)
    return np.asarray(spread / spread.mean(), np.float32).reshape(hidden.shape[:-1])


def _reader_moments(weights: Weights, head: Float32) -> Float64:
    """What an error of an embedding row is multiplied with: the first layer and the head read it.

    The head counts for half, through the residual stream and the final norm. The first attention
    and the first feed-forward part count for a quarter each. Each term has a mean diagonal of one.
    """
    first = layout.layer(0)
    attention = [f"{first}.self_attn.{name}_proj" for name in "qkv"]
    readers: tuple[tuple[float, str, Iterable[Float32]], ...] = (
        (0.5, f"{layout.FINAL_NORM}.weight", (head,)),
        (0.25, f"{first}.attention_layernorm.weight", map(weights.matrix, attention)),
        (0.25, f"{first}.feedforward_layernorm.weight",
         map(weights.matrix, [f"{first}.mlp.up_proj"])),
    )  # fmt: skip
    total = np.zeros((weights.config.hidden_size, weights.config.hidden_size))
    for share, norm, matrices in readers:
        scale = weights.vector(norm)
        product = sum(np.array(gram(matrix)) for matrix in matrices)
        total += share * damped(product * np.outer(scale, scale))
    return total


def _quantize_layer(
    before: Layer,
    after: Layer,
    specs: Mapping[str, QuantSpec],
    original: Float32,
    quantized: Float32,
    scale_type: ScaleType,
    correction: float,
) -> Iterator[tuple[str, AffineCodes]]:
    """Quantize the stages of a layer in turn, and move both streams through it."""
    parts = list(batches(*original.shape[:2]))
    for stage, names in enumerate(Layer.STAGES):
        paths = {f"{after.path}.{name}": name for name in names}
        wanted = [path for path in paths if path in specs]
        # What o is given costs attention, so it is kept; what down is given is six times as large.
        kept: list[mx.array | None] = [None] * len(parts)
        if wanted:
            moments = Moments(*(after.projections[name].weight for name in names))
            for number, part in enumerate(parts):
                streams = mx.array(original[part]), mx.array(quantized[part])
                inputs = [
                    layer.stage_input(stage, stream)
                    for layer, stream in zip((before, after), streams, strict=True)
                ]
                moments.add(*inputs)
                if stage in (1, 3):
                    original[part] = np.array(before.add(stage, streams[0], inputs[0]))
                kept[number] = inputs[1] if stage == 1 else None
            objective = Objective.of(moments, correction)
            del moments
            found: dict[str, AffineCodes] = {}
            for spec in dict.fromkeys(specs[path] for path in wanted):
                same = [path for path in wanted if specs[path] == spec]
                weights = [after.projections[paths[path]].weight for path in same]
                codes = fit(np.concatenate(weights), spec, objective, scale_type)
                found |= zip(same, codes.split(list(map(len, weights))), strict=True)
            del objective
            for path in wanted:
                after.projections[paths[path]].weight = dequantize(found[path])
                yield path, found[path]
        if stage in (1, 3):
            if not wanted:
                run_layer(partial(before.add, stage), original)
            for part, seen in zip(parts, kept, strict=True):
                moved = after.add(stage, mx.array(quantized[part]), seen)
                quantized[part] = np.array(moved)
