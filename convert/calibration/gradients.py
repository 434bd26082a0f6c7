"""What each matrix of a model is given, and what the loss would gain from another output of it.

One pass forward and one back in float32, a layer at a time. The loss is that of tokens drawn from
the model's own prediction, so the mean square of what its gradient says about an error is the
error's curvature: half of it is the divergence to expect (the Fisher information). Residual streams
wait on disk, from where an interrupted run goes on; memory holds one layer with its activations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from apertus_mlx.checkpoint import layout
from apertus_mlx.checkpoint.config import ModelConfig
from apertus_mlx.convert.evaluation.layerwise import (
    Array,
    Projection,
    Tokens,
    Weights,
    batches,
    embed,
    head_path,
)
from apertus_mlx.convert.write.array_file import is_whole, map_array, save_array
from apertus_mlx.convert.write.keep import Keep
from apertus_mlx.model.apertus import XIELU, RotaryEmbedding

# Logits that are held at once.
BLOCK_LOGITS = 1 << 24
# How far the pass back is.
BACKWARD = "backward.npz"


@dataclass(frozen=True, slots=True)
class Trace:
    """Inputs `[tokens, columns]` of some matrices, and the gradient at each one's output."""

    inputs: Array
    gradients: Mapping[str, Array]


@dataclass(frozen=True, slots=True)
class Ends:
    """What a model has before its first and after its last layer, for all tokens."""

    # Gradient at the embedding's output, and hidden states as the head is given them.
    embedding_gradient: Array
    hidden: Array
    # Logarithm of the sum of exponentials of each token's logits `[tokens]`.
    log_total: Array


class GradientLayer:
    """A decoder layer that can be run backwards."""

    def __init__(self, weights: Weights, index: int) -> None:
        self.path = layout.layer(index)
        config = weights.config
        self._head_dim, self._eps = config.head_dim, config.rms_norm_eps
        self._rope = RotaryEmbedding(config.head_dim, config.rope)
        self._weights = {
            f"{part}.{name}_proj": weights.matrix(f"{self.path}.{part}.{name}_proj")
            for part, names in (("self_attn", ("q", "k", "v", "o")), ("mlp", ("up", "down")))
            for name in names
        }
        self._norms = {
            name: mx.array(weights.vector(f"{self.path}.{name}.weight"))
            for name in (
                "attention_layernorm", "feedforward_layernorm",
                "self_attn.q_norm", "self_attn.k_norm",
            )
        }  # fmt: skip
        self._activate = XIELU()
        for name in (*layout.ALPHAS, *layout.CONSTANTS):
            value = mx.array(weights.vector(f"{self.path}.mlp.act_fn.{name}"))
            setattr(self._activate, name, value)

    def __call__(self, residual: mx.array) -> mx.array:
        """The residual stream `[B, L, D]` after this layer."""
        *_, middle, _, inner = self._forward(residual)
        return middle + self._product("mlp.down_proj", self._activate(inner))

    def back(self, residual: mx.array, gradient: mx.array) -> tuple[mx.array, list[Trace]]:
        """The gradient before the layer from that behind it, and what its matrices saw."""
        attention_input, projected, mixed, middle, up_input, inner = self._forward(residual)
        active, back = _differentiable(self._activate, inner)
        traces = [self._trace(active, {"mlp.down_proj": gradient})]
        at_inner = back(self._transposed("mlp.down_proj", gradient))
        traces.append(self._trace(up_input, {"mlp.up_proj": at_inner}))
        _, back = _differentiable(self._norm("feedforward_layernorm"), middle)
        gradient = gradient + back(self._transposed("mlp.up_proj", at_inner))
        traces.append(self._trace(mixed, {"self_attn.o_proj": gradient}))
        at_mixed = self._transposed("self_attn.o_proj", gradient)
        parts = dict(
            zip(projected, mx.vjp(self._mix, list(projected.values()), [at_mixed])[1], strict=True)
        )
        traces.append(self._trace(attention_input, parts))
        _, back = _differentiable(self._norm("attention_layernorm"), residual)
        at_input = sum((self._transposed(*part) for part in parts.items()), mx.array(0.0))
        return gradient + back(at_input), traces

    def _forward(
        self, residual: mx.array
    ) -> tuple[mx.array, dict[str, mx.array], mx.array, mx.array, mx.array, mx.array]:
        attention_input = self._norm("attention_layernorm")(residual)
        projected = {
            name: self._product(name, attention_input)
            for name in (f"self_attn.{part}_proj" for part in "qkv")
        }
        mixed = self._mix(*projected.values())
        middle = residual + self._product("self_attn.o_proj", mixed)
        up_input = self._norm("feedforward_layernorm")(middle)
        inner = self._product("mlp.up_proj", up_input)
        return attention_input, projected, mixed, middle, up_input, inner

    def _mix(self, queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
        """Attention between its projections, each `[B, L, heads * head_dim]`."""
        batch, length, _ = queries.shape
        queries, keys, values = (
            x.reshape(batch, length, -1, self._head_dim) for x in (queries, keys, values)
        )
        queries, keys = (
            self._rope(self._norm(f"self_attn.{name}_norm")(x).transpose(0, 2, 1, 3), 0)
            for name, x in (("q", queries), ("k", keys))
        )
        mixed = mx.fast.scaled_dot_product_attention(
            queries, keys, values.transpose(0, 2, 1, 3), scale=self._head_dim**-0.5, mask="causal"
        )
        return mixed.transpose(0, 2, 1, 3).reshape(batch, length, -1)

    def _norm(self, name: str) -> Callable[[mx.array], mx.array]:
        return lambda x: mx.fast.rms_norm(x, self._norms[name], self._eps)

    def _product(self, name: str, x: mx.array) -> mx.array:
        return Projection(self._weights[name])(x)

    def _transposed(self, name: str, gradient: mx.array) -> mx.array:
        return Projection(self._weights[name].T)(gradient)

    def _trace(self, inputs: mx.array, gradients: Mapping[str, mx.array]) -> Trace:
        return Trace(_rows(inputs), {f"{self.path}.{k}": _rows(v) for k, v in gradients.items()})


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
        folder: for the residual streams (`kept_bytes`) and the state of the pass back.
    """
    config = weights.config
    depth = config.num_hidden_layers
    parts = list(batches(*windows.shape))
    backward = Keep(folder / BACKWARD)
    streams = [folder / f"stream-{index:04d}.npy" for index in range(depth + 1)]
    whole = next((n for n, path in enumerate(streams) if not is_whole(path)), depth + 1)
    reached = max(0, whole - 1)
    if whole == 0:
        save_array(streams[0], embed(weights.matrix(layout.EMBEDDING), windows))
    for index in range(reached, depth):
        layer = GradientLayer(weights, index)
        before = map_array(streams[index])
        after = np.empty(before.shape, np.float32)
        for part in parts:
            after[part] = np.array(layer(mx.array(before[part])))
        save_array(streams[index + 1], after)
        progress(index + 1)
    scale = mx.array(weights.vector(f"{layout.FINAL_NORM}.weight"))
    hidden, back = _differentiable(
        lambda x: mx.fast.rms_norm(x, scale, config.rms_norm_eps),
        mx.array(map_array(streams[depth])),
    )
    states = _rows(hidden)
    kept = backward.load()
    if kept is None:
        at_hidden, log_total = _loss_gradient(states, weights.matrix(head_path(config)), seed)
        gradient = np.array(back(mx.array(at_hidden).reshape(hidden.shape)))
        left = depth
        backward.save({"left": left}, {"gradient": gradient, "log_total": log_total})
        del at_hidden
    else:
        left = int(kept[0]["left"])
        gradient, log_total = (kept[1][name] for name in ("gradient", "log_total"))
    del hidden, back
    for index in reversed(range(left)):
        layer = GradientLayer(weights, index)
        before = map_array(streams[index])
        found = []
        for part in parts:
            earlier, traces = layer.back(mx.array(before[part]), mx.array(gradient[part]))
            gradient[part] = np.array(earlier)
            found.append(traces)
        use([_joined(same) for same in zip(*found, strict=True)])
        backward.reach({"left": index}, {"gradient": gradient, "log_total": log_total})
        progress(2 * depth - index)
    return Ends(gradient.reshape(-1, config.hidden_size), states, log_total)


def kept_bytes(config: ModelConfig, tokens: int) -> int:
    """What `trace_layers` has on disk: every residual stream, and two gradients."""
    return 4 * tokens * (config.hidden_size * (config.num_hidden_layers + 3) + 2)


def _loss_gradient(hidden: Array, head: Array, seed: int) -> tuple[Array, Array]:
    """Gradient at the hidden states for tokens drawn from the prediction; see also `Ends`."""
    draw = np.random.default_rng(seed)
    gradient, log_total = np.empty_like(hidden), np.empty(len(hidden), np.float32)
    size = max(1, BLOCK_LOGITS // len(head))
    for start in range(0, len(hidden), size):
        part = slice(start, start + size)
        logits = hidden[part] @ head.T
        highest = logits.max(-1, keepdims=True)
        logits -= highest
        np.exp(logits, out=logits)
        total = logits.sum(-1, keepdims=True)
        log_total[part] = (highest + np.log(total))[:, 0]
        logits /= total
        levels = np.cumsum(logits, -1)
        drawn = (levels < draw.random((len(levels), 1)) * levels[:, -1:]).sum(-1)
        logits[np.arange(len(drawn)), drawn] -= 1
        gradient[part] = logits @ head
    return gradient, log_total


def _differentiable(
    function: Callable[[mx.array], mx.array], x: mx.array
) -> tuple[mx.array, Callable[[mx.array], mx.array]]:
    """A function's value, and what takes gradients at its value to gradients at `x`."""
    return function(x), lambda gradient: mx.vjp(function, [x], [gradient])[1][0]


def _rows(x: mx.array) -> Array:
    return np.array(x).reshape(-1, x.shape[-1])


def _joined(traces: tuple[Trace, ...]) -> Trace:
    """The same matrices' traces of several batches, one after the other."""
    return Trace(
        np.concatenate([trace.inputs for trace in traces]),
        {
            path: np.concatenate([trace.gradients[path] for trace in traces])
            for path in traces[0].gradients
        },
    )
