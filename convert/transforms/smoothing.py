"""Scales for `--smooth`: for each set of matrices with one input, the ones with the least error.

One pass over the layers of the original, judged on the second moments of what the matrices are
given, by the way of rounding that will follow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import mlx.core as mx
import numpy as np

from apertus_mlx.backend.hardware import has_gpu
from apertus_mlx.checkpoint import layout
from apertus_mlx.convert.evaluation.layerwise import Layer, Weights, batches
from apertus_mlx.convert.evaluation.products import quickest
from apertus_mlx.convert.evaluation.texts import Tokens
from apertus_mlx.convert.plan.plan import Step
from apertus_mlx.convert.sources.reading import MLX_TYPES
from apertus_mlx.convert.transforms.names import (
    ATTENTION_NORM,
    FEED_FORWARD_NORM,
    SMOOTHED,
    VALUES,
    value_owners,
)
from apertus_mlx.convert.write.keep import NOTHING, Keep
from apertus_mlx.quant import search
from apertus_mlx.quant.affine import ScaleType, dequantize, round_scales
from apertus_mlx.quant.arrays import Array, Float32, Float64, settled
from apertus_mlx.quant.transforms import choose_scales

_STREAM = "stream"
Rounding = Callable[[Float32, Float64], Float32]


def smoothing_scales(
    weights: Weights,
    rounding: Mapping[str, Rounding],
    windows: Tokens,
    scale_type: ScaleType = "BF16",
    progress: Callable[[int], None] | None = None,
    keep: Keep = NOTHING,
) -> dict[str, Float32]:
    """Scales by the name of the norm or the path of the v that gives them up.

    Only where they gain. Those of norms are such that the norm's new weight is stored exactly.

    Args:
        weights: the original.
        rounding: for each matrix that will be quantized, what becomes of rows `[rows, columns]`
            whose inputs have mean squares `[columns]`.
        windows: calibration tokens `[windows, length]`.
        scale_type: what the weights of norms will be stored in.
        progress: told how many layers are done.
        keep: where scales and stream are kept, at most once a minute; an interrupted run goes on
            there.
    """
    found: dict[str, Float32] = {}
    owners = value_owners(weights.config)
    kept = keep.load()
    if kept is None:
        done, residual = 0, weights.matrix(layout.EMBEDDING)[windows]
    else:
        done, found = int(kept[0]["layers"]), kept[1]
        residual = found.pop(_STREAM)
    for index in range(done, weights.config.num_hidden_layers):
        layer = Layer(weights, index)
        for giver, moments in _run(layer, residual).items():
            readers = [name for name in SMOOTHED[giver] if f"{layer.path}.{name}" in rounding]
            if not readers:
                continue
            scales = choose_scales(
                [layer.projections[name].weight for name in readers],
                moments,
                [rounding[f"{layer.path}.{name}"] for name in readers],
                owners if giver == VALUES else None,
            ).astype(np.float32)
            path = f"{layer.path}.{giver}"
            if (scales != 1).any():
                is_norm = giver != VALUES
                found[path] = (
                    _storable(weights.vector(path), scales, scale_type) if is_norm else scales
                )
        keep.reach({"layers": index + 1}, {**found, _STREAM: residual})
        if progress is not None:
            progress(index + 1)
    return found


def rounding_of(step: Step, effort: search.Effort = search.QUICK) -> Rounding:
    """What `step` will do to rows of its matrix, or nearly: GPTQ starts from a weighted search.

    `effort` is that of the search.
    """
    spec = step.spec
    assert spec is not None

    def rounded(weight: Float32, squares: Float64) -> Float32:
        if step.method != "gptq":
            return dequantize(search.fit(quickest(weight), spec, None, step.dtype))
        target, moments = quickest(np.ascontiguousarray(weight.T)), squares.astype(np.float32)
        found = search.fit_columns(target, spec, moments, step.dtype, effort)
        return np.asarray(found.values().T)

    def rounded_by_mlx(weight: Float32, _squares: Float64) -> Float32:
        values = mx.array(weight).astype(MLX_TYPES[step.dtype])
        codes, scales, *others = mx.quantize(
            values, group_size=spec.group_size, bits=spec.bits, mode=spec.mode
        )
        biases = None
        if others:
            scales, biases = scales.astype(mx.float32), others[0].astype(mx.float32)
        again = mx.dequantize(
            codes, scales, biases, group_size=spec.group_size, bits=spec.bits, mode=spec.mode
        )
        return np.array(again.astype(mx.float32))

    return rounded_by_mlx if step.method == "rtn" else rounded


def _run(layer: Layer, residual: Float32) -> dict[str, Float32]:
    """Second moments of the outputs of norms and v; moves `residual` through the layer."""
    moments: dict[str, Array] = {}

    def count(name: str, values: mx.array) -> None:
        rows: Array = values.reshape(-1, values.shape[-1])
        if not has_gpu():
            rows = np.array(rows, copy=False)
        seen = rows.T @ rows
        moments[name] = moments[name] + seen if name in moments else seen
        settled(moments[name])

    for part in batches(*residual.shape[:2]):
        stream = mx.array(residual[part])
        count(ATTENTION_NORM, layer.stage_input(0, stream))
        count(VALUES, layer.stage_input(1, stream))
        stream = layer.add(1, stream)
        count(FEED_FORWARD_NORM, layer.stage_input(2, stream))
        residual[part] = np.array(layer.add(3, stream))
    return {name: np.asarray(found) for name, found in moments.items()}


def _storable(norm: Float32, scales: Float32, scale_type: ScaleType) -> Float32:
    """Scales near `scales` by which `norm` can be divided without rounding it."""
    divided = round_scales(norm / scales, scale_type)
    usable = (norm != 0) & (divided != 0) & np.isfinite(divided)
    return np.divide(norm, divided, out=np.ones_like(norm), where=usable)
