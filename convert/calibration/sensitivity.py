"""How much each matrix matters: the divergence to expect when it alone is stored in fewer bits.

To second order the divergence of the predictions, for an error that moves a matrix's output by d,
is half the mean of `(g . d)^2` over tokens, g being the gradient of `gradients`. The error is the
real one of each format. What is measured is kept after each layer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from apertus_mlx.checkpoint import layout
from apertus_mlx.convert.calibration.gradients import BACKWARD, Ends, Trace, trace_layers
from apertus_mlx.convert.evaluation.layerwise import Weights, head_path, logit_blocks
from apertus_mlx.convert.evaluation.texts import Tokens
from apertus_mlx.convert.transforms.smoothing import Rounding
from apertus_mlx.convert.write.keep import Keep
from apertus_mlx.quant import gptq
from apertus_mlx.quant.affine import ScaleType, dequantize
from apertus_mlx.quant.arrays import Float32, Float64
from apertus_mlx.quant.curvature import damped
from apertus_mlx.quant.spec import QuantSpec

SEED = 1
# What GPTQ leaves of the divergence is measured on so many rows of each matrix, at this width.
TRIAL_ROWS = 256
TRIAL_BITS = 3

Roundings = Mapping[QuantSpec, Rounding]
Divergences = dict[str, dict[QuantSpec, float]]


def predict_divergences(
    weights: Weights,
    roundings: Mapping[str, Roundings],
    windows: Tokens,
    folder: Path,
    gptq_paths: Collection[str] = (),
    scale_type: ScaleType = "BF16",
    progress: Callable[[int], None] | None = None,
) -> Divergences:
    """Expected mean divergence, in nats, for each matrix alone in each of its formats.

    Args:
        weights: of the model.
        roundings: by module path, the formats to try, each with what it makes of rows.
        windows: calibration tokens `[windows, length]`.
        folder: where an interrupted run with the same arguments has kept what it measured.
        gptq_paths: matrices that GPTQ will quantize: what it gains over rounding is counted.
        scale_type: what scales and biases will be stored in.
        progress: told runs through layers that are done, of twice as many as there are layers.
    """
    config = weights.config
    keep = Keep(folder / "damages.npz")
    found = keep.load()
    if found is None:
        # Whatever the pass back had gone by would be missing.
        Keep(folder / BACKWARD).discard()
        keep.save({}, {})
    kept, _ = found or ({}, {})
    divergences: Divergences = {
        path: dict(zip(roundings[path], values, strict=True)) for path, values in kept.items()
    }
    if divergences.keys() >= roundings.keys():
        return divergences

    def look(traces: list[Trace]) -> None:
        for trace in traces:
            squares = np.square(trace.inputs).mean(0)
            for path in trace.gradients.keys() & roundings.keys():
                weight, gradient = weights.matrix(path), trace.gradients[path]
                left = 1.0
                if path in gptq_paths:
                    moments = damped(trace.inputs.T @ trace.inputs)
                    rows, *errors = _try_gptq(weight, roundings[path], moments, scale_type)
                    left = _ratio(
                        *(_divergence(e, trace.inputs, gradient[:, rows]) for e in errors)
                    )
                divergences[path] = {
                    spec: left
                    * _divergence(rounding(weight, squares) - weight, trace.inputs, gradient)
                    for spec, rounding in roundings[path].items()
                }
        save()

    def save() -> None:
        keep.save({path: list(found.values()) for path, found in divergences.items()}, {})

    ends = trace_layers(weights, windows, SEED, look, progress or (lambda _: None), folder)
    for path in {layout.EMBEDDING, head_path(config)} & roundings.keys():
        weight = weights.matrix(path)
        uses = (path == layout.EMBEDDING, path == head_path(config))
        left = 1.0
        if path in gptq_paths:
            curvature = _end_curvature(ends, *uses)
            _, *errors = _try_gptq(weight, roundings[path], curvature, scale_type)
            left = _ratio(*(float(np.sum(error @ curvature * error)) for error in errors))
        divergences[path] = {
            spec: left * _end_divergence(weight, rounding, ends, windows.reshape(-1), *uses)
            for spec, rounding in roundings[path].items()
        }
    save()
    return divergences


def _divergence(error: Float32, inputs: Float32, gradient: Float32) -> float:
    """Of an error `[rows, columns]` of a matrix."""
    return _half_square(np.einsum("tr,tr->t", inputs @ error.T, gradient))


def _half_square(slopes: npt.NDArray[np.floating]) -> float:
    return float(np.square(slopes, dtype=np.float64).mean()) / 2


def _try_gptq(
    weight: Float32, formats: Roundings, moments: Float64, scale_type: ScaleType
) -> tuple[npt.NDArray[np.intp], Float32, Float32]:
    """Some rows of a matrix, and their errors by GPTQ and by rounding, at about 3 bits."""
    rows = np.linspace(0, len(weight) - 1, min(TRIAL_ROWS, len(weight))).astype(np.intp)
    spec = min(formats, key=lambda spec: abs(spec.bits - TRIAL_BITS))
    some = weight[rows]
    fitted = dequantize(gptq.fit(some, spec, moments, scale_type, damping=0.0))
    return rows, fitted - some, formats[spec](some, np.diag(moments)) - some


def _ratio(fitted: float, plain: float) -> float:
    """What share of the divergence is left."""
    return min(1.0, fitted / plain) if plain > 0 else 1.0


def _end_curvature(ends: Ends, is_embedding: bool, is_head: bool) -> Float64:
    """What the error of a row is multiplied with, where it is looked up and where it is read."""
    curvature = np.zeros((ends.hidden.shape[1],) * 2)
    if is_embedding:
        curvature += damped(ends.embedding_gradient.T @ ends.embedding_gradient)
    if is_head:
        curvature += damped(ends.hidden.T @ ends.hidden)
    return curvature


def _end_divergence(
    weight: Float32, rounding: Rounding, ends: Ends, ids: Tokens, is_embedding: bool, is_head: bool
) -> float:
    """The same for the embedding, the head, or both in one; rows are looked at in blocks."""
    slopes, mean, square = (np.zeros(len(ids)) for _ in range(3))
    squares = np.square(ends.hidden).mean(0) if is_head else np.ones(weight.shape[1])
    for part in logit_blocks(len(weight), len(ids)):
        start, block = part.start, weight[part]
        error = rounding(block, squares) - block
        if is_embedding:
            inside = (ids >= start) & (ids < start + len(block))
            rows = error[ids[inside] - start]
            slopes[inside] = np.einsum("tc,tc->t", rows, ends.embedding_gradient[inside])
        if is_head:
            share = np.exp(ends.hidden @ block.T - ends.log_total[:, None])
            moved = ends.hidden @ error.T
            mean += np.einsum("tv,tv->t", share, moved)
            square += np.einsum("tv,tv,tv->t", share, moved, moved)
    # For the head nothing need be drawn: the variance of the logits' error under the prediction.
    return _half_square(slopes) + float((square - np.square(mean)).mean()) / 2
