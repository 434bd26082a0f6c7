"""How much each matrix matters: the divergence to expect when it alone is stored in fewer bits.

To second order the divergence of the predictions, for an error that moves a matrix's output by d,
is half the mean of `(g . d)^2` over tokens, g being the gradient of `gradients`. The error is the
real one of each format. What is measured is kept after each layer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from apertus_mlx.checkpoint import layout
from apertus_mlx.convert.calibration.gradients import BACKWARD, Ends, Trace, trace_layers
from apertus_mlx.convert.evaluation.layerwise import Weights, head_path, logit_blocks
from apertus_mlx.convert.evaluation.products import GIVEN_ROWS, gram, quickest
from apertus_mlx.convert.evaluation.texts import Tokens
from apertus_mlx.convert.transforms.smoothing import Rounding
from apertus_mlx.convert.write.keep import Keep
from apertus_mlx.quant import gptq, search
from apertus_mlx.quant.affine import ScaleType
from apertus_mlx.quant.arrays import Float32, Float64, blocks, exponentials, row_dots
from apertus_mlx.quant.curvature import Curvature, damped
from apertus_mlx.quant.spec import QuantSpec

SEED = 1
# What GPTQ leaves of the divergence is measured on so many rows of each matrix, at this width.
TRIAL_ROWS = 256
TRIAL_BITS = 3
# Divergences in more bits than this follow from those in fewer, and those of larger groups from
# those of the smallest, by the sizes of the errors in so many rows.
MEASURED_BITS = 4
SIZE_ROWS = 32

Roundings = Mapping[QuantSpec, Rounding]
Divergences = Mapping[str, Mapping[QuantSpec, float]]


@dataclass(frozen=True, slots=True)
class Prediction:
    """Expected mean divergences, in nats, for each matrix alone in each of its formats.

    Attributes:
        final: as it will be quantized.
        rounded: if it were only rounded, where GPTQ will quantize it.
    """

    final: Divergences
    rounded: Divergences


def predict_divergences(
    weights: Weights,
    roundings: Mapping[str, Roundings],
    windows: Tokens,
    folder: Path,
    gptq_paths: Collection[str] = (),
    scale_type: ScaleType = "BF16",
    progress: Callable[[int], None] | None = None,
) -> Prediction:
    """What storing each matrix alone in each of its formats costs.

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
    begun = keep.load()
    if begun is None:
        # Whatever the pass back had gone by would be missing.
        Keep(folder / BACKWARD).discard()
        keep.save({}, {})
    rounded: dict[str, dict[QuantSpec, float]] = {}
    # What GPTQ leaves of it.
    shares: dict[str, float] = {}
    for path, (share, *values) in (begun or ({}, {}))[0].items():
        rounded[path], shares[path] = dict(zip(roundings[path], values, strict=True)), share

    def prediction() -> Prediction:
        final = {
            path: {spec: shares[path] * divergence for spec, divergence in found.items()}
            for path, found in rounded.items()
        }
        return Prediction(final, rounded)

    if rounded.keys() >= roundings.keys():
        return prediction()

    def look(traces: list[Trace]) -> None:
        for trace in traces:
            inputs, paths = trace.inputs, trace.gradients.keys() & roundings.keys()
            squares = np.square(inputs).mean(0, dtype=np.float64)
            curvature = None
            if not paths.isdisjoint(gptq_paths):
                curvature = Curvature.of(gram(inputs))
            for path in sorted(paths):
                weight, gradient = weights.matrix(path), trace.gradients[path]
                found, shares[path] = {}, 1.0
                if path in gptq_paths and curvature is not None:
                    trial = _try_gptq(weight, roundings[path], curvature, scale_type)
                    left, plain = (
                        _divergence(error, inputs, np.ascontiguousarray(gradient[:, trial.rows]))
                        for error in (trial.left, trial.plain)
                    )
                    shares[path] = _ratio(left, plain)
                    if len(trial.rows) == len(weight):
                        found[trial.spec] = plain
                for spec in _measured(roundings[path]) - found.keys():
                    error = roundings[path][spec](weight, squares) - weight
                    found[spec] = _divergence(error, inputs, gradient)
                sizes = _sizes(weight, roundings[path], squares)
                rounded[path] = _by_size(found, sizes)
        save()

    def save() -> None:
        keep.save({path: [shares[path], *found.values()] for path, found in rounded.items()}, {})

    ends = trace_layers(weights, windows, SEED, look, progress or (lambda _: None), folder)
    for path in {layout.EMBEDDING, head_path(config)} & roundings.keys():
        weight = weights.matrix(path)
        uses = (path == layout.EMBEDDING, path == head_path(config))
        shares[path] = 1.0
        if path in gptq_paths:
            curvature = Curvature.of(quickest(_end_moments(ends, *uses).astype(np.float32)))
            trial = _try_gptq(weight, roundings[path], curvature, scale_type)
            shares[path] = _ratio(
                *(
                    float(np.vdot(np.array(quickest(error) @ curvature.moments), error))
                    for error in (trial.left, trial.plain)
                )
            )
        found, sizes = _end_divergences(weight, roundings[path], ends, windows.reshape(-1), *uses)
        rounded[path] = _by_size(found, sizes)
    save()
    return prediction()


def _measured(formats: Iterable[QuantSpec]) -> set[QuantSpec]:
    """The formats whose divergence is measured; that of others follows from the size of the error.

    In many bits the errors of weights are noise that knows nothing of the rest, so the divergence
    goes with their mean square. It is measured in few bits, for the smallest groups.
    """
    smallest: dict[int, QuantSpec] = {}
    for spec in sorted(formats, key=lambda spec: (spec.bits, spec.group_size)):
        smallest.setdefault(spec.bits, spec)
    few = {spec for bits, spec in smallest.items() if bits <= MEASURED_BITS}
    return few or {smallest[min(smallest)]}


def _by_size(
    measured: Mapping[QuantSpec, float], sizes: Mapping[QuantSpec, float]
) -> dict[QuantSpec, float]:
    """All formats' divergences, from that which was measured in as many bits or nearly so."""
    found = {}
    for spec, size in sizes.items():
        near = min(measured, key=lambda other: abs(other.bits - spec.bits))
        share = size / sizes[near] if sizes[near] > 0 else float(size > 0)
        found[spec] = measured.get(spec, measured[near] * share)
    return found


def _sizes(weight: Float32, formats: Roundings, squares: Float64) -> dict[QuantSpec, float]:
    """What errors of some rows come to if inputs, of mean squares `[columns]`, are independent."""
    some, found = weight[_some(weight, SIZE_ROWS)], {}
    for spec, rounding in formats.items():
        error = rounding(some, squares) - some
        found[spec] = float(np.einsum("rc,rc->c", error, error) @ squares)
    return found


def _divergence(error: Float32, inputs: Float32, gradient: Float32) -> float:
    """Of an error `[rows, columns]` of a matrix."""
    slopes, turned = np.empty(len(inputs), np.float32), quickest(error).T
    for part in blocks(len(inputs), GIVEN_ROWS):
        moved = quickest(inputs[part]) @ turned
        slopes[part] = np.array(row_dots(moved, quickest(gradient[part])))
    return _half_square(slopes)


def _half_square(slopes: npt.NDArray[np.floating]) -> float:
    return float(np.square(slopes, dtype=np.float64).mean()) / 2


class _Trial(NamedTuple):
    """Some rows of a matrix, and their errors in one format, by GPTQ and by rounding."""

    spec: QuantSpec
    rows: npt.NDArray[np.intp]
    left: Float32
    plain: Float32


def _try_gptq(
    weight: Float32, formats: Roundings, curvature: Curvature, scale_type: ScaleType
) -> _Trial:
    """At about 3 bits."""
    rows = _some(weight, TRIAL_ROWS)
    spec = min(formats, key=lambda spec: abs(spec.bits - TRIAL_BITS))
    some = weight[rows]
    target = quickest(np.ascontiguousarray(some.T))
    start = search.fit_columns(target, spec, curvature.diagonal, scale_type, search.ROUGH)
    left = np.array(gptq.round_in_order(target, start, curvature).values().T) - some
    plain = formats[spec](some, curvature.diagonal.astype(np.float64)) - some
    return _Trial(spec, rows, left, plain)


def _some(weight: Float32, count: int) -> npt.NDArray[np.intp]:
    """At most so many of its rows, evenly spaced."""
    return np.linspace(0, len(weight) - 1, min(count, len(weight))).astype(np.intp)


def _ratio(fitted: float, plain: float) -> float:
    """What share of the divergence is left."""
    return min(1.0, fitted / plain) if plain > 0 else 1.0


def _end_moments(ends: Ends, is_embedding: bool, is_head: bool) -> Float64:
    """What the error of a row is multiplied with, where it is looked up and where it is read."""
    moments = np.zeros((ends.hidden.shape[1],) * 2)
    if is_embedding:
        moments += damped(np.array(gram(ends.embedding_gradient)))
    if is_head:
        moments += damped(np.array(gram(ends.hidden)))
    return moments


def _end_divergences(
    weight: Float32,
    roundings: Roundings,
    ends: Ends,
    ids: Tokens,
    is_embedding: bool,
    is_head: bool,
) -> tuple[dict[QuantSpec, float], dict[QuantSpec, float]]:
    """For the embedding, the head, or both in one: what is measured, and sizes of all errors.

    Rows are looked at in blocks.
    """
    measured = _measured(roundings)
    slopes, mean, square = ({spec: np.zeros(len(ids)) for spec in measured} for _ in range(3))
    squares = np.ones(weight.shape[1])
    if is_head:
        squares = np.square(ends.hidden).mean(0, dtype=np.float64)
        hidden, log_total = quickest(ends.hidden), quickest(ends.log_total[:, None])
    for part in logit_blocks(len(weight), len(ids)):
        start, block = part.start, weight[part]
        inside = (ids >= start) & (ids < start + len(block))
        if is_head:
            logits = hidden @ quickest(block).T
            logits -= log_total
            shares = exponentials(logits)
        for spec in measured:
            error = roundings[spec](block, squares) - block
            if is_embedding:
                rows = error[ids[inside] - start]
                gradient = ends.embedding_gradient[inside]
                slopes[spec][inside] = np.einsum("tc,tc->t", rows, gradient)
            if is_head:
                moved = hidden @ quickest(error).T
                mean[spec] += np.array(row_dots(shares, moved))
                moved *= moved
                square[spec] += np.array(row_dots(shares, moved))
    # For the head nothing need be drawn: the variance of the logits' error under the prediction.
    found = {
        spec: _half_square(slopes[spec]) + float((square[spec] - np.square(mean[spec])).mean()) / 2
        for spec in measured
    }
    return found, _sizes(weight, roundings, squares)
