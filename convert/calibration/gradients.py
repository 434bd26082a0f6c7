"""The inputs of each matrix of a model, and the gradients of the loss at its outputs.

One forward and one backward pass in float32, a layer at a time. The loss is the cross-entropy of
tokens drawn from the model's own prediction, so the mean square of its gradients is the Fisher
information: half of it is the expected divergence. The residual streams lie on disk, and an
interrupted run goes on from there. Memory holds one layer with its activations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from apertus_mlx.checkpoint import layout
from apertus_mlx.convert.evaluation.layerwise import (
    Layer,
    Weights,
    batches,
    head_path,
    logit_blocks,
    run_layer,
)
from apertus_mlx.convert.evaluation.products import quickest
from apertus_mlx.convert.evaluation.texts import Tokens
from apertus_mlx.convert.write.keep import Keep, load_arrays, save_arrays
from apertus_mlx.errors import ResourceError
from apertus_mlx.quant.arrays import Array, Float32, as_library, exponentials, library

# Tokens that go back through a layer at once. MLX holds what it computes for them meanwhile.
BACKWARD_TOKENS = 512
# How far the pass back is.
BACKWARD = "backward.npz"


@dataclass(frozen=True, slots=True)
class Trace:
    """Inputs `[tokens, columns]` of some matrices, and the gradient at each one's output."""

    inputs: Float32
    gradients: Mapping[str, Float32]


@dataclass(frozen=True, slots=True)
class Ends:
    """What a model has before its first and after its last layer, for all tokens."""

    # Gradient at the embedding's output, and hidden states as the head is given them.
    embedding_gradient: Float32
    hidden: Float32
    # Logarithm of the sum of exponentials of each token's logits `[tokens]`.
    log_total: Float32


def backward(layer: Layer, residual: mx.array, gradient: mx.array) -> tuple[mx.array, list[Trace]]:
    """The gradient before `layer` from that after it, both `[B, L, D]`, and a trace of each stage.

    Args:
        layer: a decoder layer.
        residual: the residual stream before it.
        gradient: at the residual stream after it.
    """
    seen: dict[str, list[tuple[mx.array, mx.array]]] = {name: [] for name in layer.projections}
    for name, projection in layer.projections.items():
        projection.trace = seen[name]
    _, (earlier,) = mx.vjp(layer, [residual], [gradient])
    rows = {}
    for name, projection in layer.projections.items():
        projection.trace = None
        # MLX holds the list, so it must not hold MLX's arrays.
        rows[name] = [_rows(array) for array in seen[name].pop()]
    return earlier, [
        Trace(rows[stage[0]][0], {f"{layer.path}.{name}": rows[name][1] for name in stage})
        for stage in layer.STAGES
    ]


def trace_layers(
    weights: Weights,
    windows: Tokens,
    seed: int,
    use: Callable[[list[Trace]], None],
    progress: Callable[[int], None],
    folder: Path,
) -> Ends:
    """Run all layers forwards and backwards on `windows` `[windows, length]`.

    Args:
        weights: of the model.
        windows: token ids.
        seed: of the tokens that are drawn from the predictions.
        use: called with the traces of each layer, of all tokens, the last layer first; not for
            layers that an interrupted run has used, but for those of its last minute.
        progress: told after each layer of both passes how many are done.
        folder: for the residual streams and the state of the pass back.
    """
    config = weights.config
    depth = config.num_hidden_layers
    reached_back = Keep(folder / BACKWARD)
    streams = [folder / f"stream-{index:04d}.npz" for index in range(depth + 1)]
    stream = weights.matrix(layout.EMBEDDING)[windows]
    for index, path in enumerate(streams):
        kept = load_arrays(path)
        if kept is not None:
            stream = kept["stream"]
            continue
        if index > 0:
            run_layer(Layer(weights, index - 1), stream)
            progress(index)
        save_arrays(path, {"stream": stream})
    scale = mx.array(weights.vector(f"{layout.FINAL_NORM}.weight"))
    last = mx.array(stream)
    del stream
    hidden = mx.fast.rms_norm(last, scale, config.rms_norm_eps)
    states = _rows(hidden)
    found = reached_back.load()
    if found is None:
        head = quickest(weights.matrix(head_path(config)))
        at_hidden, log_total = _loss_gradient(states, head, seed)
        del head
        _, (at_last,) = mx.vjp(
            lambda x: mx.fast.rms_norm(x, scale, config.rms_norm_eps),
            [last], [mx.array(at_hidden).reshape(hidden.shape)],
        )  # fmt: skip
        gradient = np.array(at_last)
        left = depth
        reached_back.save({"left": left}, {"gradient": gradient, "log_total": log_total})
        del at_hidden, at_last
    else:
        left = int(found[0]["left"])
        gradient, log_total = (found[1][name] for name in ("gradient", "log_total"))
    del hidden, last
    for index in reversed(range(left)):
        layer = Layer(weights, index)
        kept = load_arrays(streams[index])
        if kept is None:
            raise ResourceError(
                f"{streams[index]}: was damaged or taken away meanwhile; start again"
            )
        before, (count, length) = kept["stream"], windows.shape
        whole: list[Trace] = []
        for part in batches(count, length, BACKWARD_TOKENS):
            earlier, traces = backward(layer, mx.array(before[part]), mx.array(gradient[part]))
            gradient[part] = np.array(earlier)
            whole = whole or [_blank(trace, count * length) for trace in traces]
            for trace, some in zip(whole, traces, strict=True):
                _put(trace, slice(part.start * length, part.stop * length), some)
            del earlier, traces
        use(whole)
        del layer, whole, trace, some
        reached_back.reach({"left": index}, {"gradient": gradient, "log_total": log_total})
        progress(2 * depth - index)
    return Ends(gradient.reshape(-1, config.hidden_size), states, log_total)


def _loss_gradient(hidden: Float32, head: Array, seed: int) -> tuple[Float32, Float32]:
    """Gradient at the hidden states for tokens drawn from the prediction; see also `Ends`."""
    xp, draw = library(head), np.random.default_rng(seed)
    gradient, log_total = np.empty_like(hidden), np.empty(len(hidden), np.float32)
    for part in logit_blocks(len(hidden), len(head)):
        logits = quickest(hidden[part]) @ head.T
        highest = logits.max(-1, keepdims=True)
        logits -= highest
        shares = exponentials(logits)
        total = shares.sum(-1, keepdims=True)
        log_total[part] = np.array(highest + xp.log(total))[:, 0]
        shares /= total
        levels = xp.cumsum(shares, -1)
        reached = draw.random((len(levels), 1)) * np.array(levels[:, -1:])
        drawn = (levels < as_library(reached, head)).sum(-1)
        rows = as_library(np.arange(len(levels)), head)
        shares[rows, drawn] = shares[rows, drawn] - 1
        gradient[part] = np.array(shares @ head)
    return gradient, log_total


def _rows(x: mx.array) -> Float32:
    return np.array(x).reshape(-1, x.shape[-1])


def _blank(trace: Trace, tokens: int) -> Trace:
    """Room for the traces of the same matrices of so many tokens."""

    def room(rows: Float32) -> Float32:
        return np.empty((tokens, rows.shape[1]), np.float32)

    return Trace(room(trace.inputs), {path: room(rows) for path, rows in trace.gradients.items()})


def _put(trace: Trace, part: slice, some: Trace) -> None:
    trace.inputs[part] = some.inputs
    for path, rows in some.gradients.items():
        trace.gradients[path][part] = rows
