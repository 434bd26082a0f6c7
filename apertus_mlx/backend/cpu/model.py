"""The whole model on the CPU: one onnxruntime graph between attentions, and attention."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from apertus_mlx.backend import hardware
from apertus_mlx.backend.cpu.allocator import map_large_blocks
from apertus_mlx.backend.cpu.attention import Attention
from apertus_mlx.backend.cpu.cache import CPUCache
from apertus_mlx.backend.cpu.limits import HEAD_DIM_STEP, CPUCannotError
from apertus_mlx.backend.cpu.runtime import Session
from apertus_mlx.backend.cpu.single import SingleStep
from apertus_mlx.backend.cpu.stage import MAX_EPS, Stage
from apertus_mlx.backend.cpu.tensors import Precision, Tensors
from apertus_mlx.backend.cpu.weights import Floats
from apertus_mlx.cache import FULL_PRECISION, Cache, CacheConfig, make_layer_cache
from apertus_mlx.checkpoint import layout
from apertus_mlx.checkpoint.config import ModelConfig
from apertus_mlx.checkpoint.inventory import Inventory
from apertus_mlx.model.apertus import rotary_wavelengths
from apertus_mlx.model.language_model import NextTokenLogits


class CPUModel:
    """What `apertus_mlx.model.apertus.Model` computes, in float32; answers to the same calls.

    Args:
        inventory: the checkpoint.
        precision: of activations inside products with quantized weights. int8, one scale per group,
            is up to twice as fast, with errors of half a percent per product; auto takes it where
            it adds less than a tenth of what quantization lost, that is up to 5 bits.
        on_bytes: is told the bytes read so far and in all.

    Raises:
        CPUCannotError: a sound checkpoint that only MLX can run.
        RejectedError: weights that are not finite.
    """

    def __init__(
        self,
        inventory: Inventory,
        precision: Precision = "auto",
        on_bytes: Callable[[int, int], None] | None = None,
    ) -> None:
        self.config = config = inventory.config
        if config.head_dim % HEAD_DIM_STEP:
            raise CPUCannotError(
                f"{inventory.name}: head_dim {config.head_dim} is no multiple of {HEAD_DIM_STEP}, "
                "as the CPU path needs it: use --compute mlx"
            )
        self.precision = precision
        map_large_blocks()
        tensors = Tensors(inventory, precision, on_bytes)
        self._rounded_bits = tensors.rounded_bits()
        # The head is the largest part: first, while nothing else is held.
        self._head = _head_stage(config, tensors)
        self._embed = tensors.embedding()
        self._stages = [
            _layer_stage(config, tensors, index) for index in range(config.num_hidden_layers + 1)
        ]
        self._attention = Attention(config)
        self._single_step = SingleStep(config, self._stages)
        waves = np.array(rotary_wavelengths(config.head_dim, config.rope), np.float32)
        self._radians_per_position = np.float32(1) / waves

    def __call__(self, inputs: mx.array, cache: Sequence[Cache | None] | None = None) -> mx.array:
        """Logits `[B, L, vocabulary]` of the token ids `inputs` `[B, L]`."""
        return self._logits(self._hidden(inputs, cache), inputs.shape)

    def model(self, inputs: mx.array, cache: Sequence[Cache | None] | None = None) -> mx.array:
        """Final hidden states `[B, L, D]` of the token ids `inputs` `[B, L]`."""
        return mx.array(self._hidden(inputs, cache).reshape(*inputs.shape, -1))

    def logits(self, hidden: mx.array) -> mx.array:
        """Logits `[B, L, vocabulary]` of final hidden states `[B, L, D]`."""
        rows = np.asarray(hidden.astype(mx.float32)).reshape(-1, hidden.shape[-1])
        return self._logits(np.ascontiguousarray(rows), hidden.shape[:-1])

    def next_token_logits(
        self, inputs: mx.array, cache: Sequence[Cache | None] | None = None
    ) -> NextTokenLogits:
        """Logits of the token after the last of `inputs` `[1, L]`."""
        hidden = self._hidden(inputs, cache)[-1:]
        return NextTokenLogits(self._logits(hidden, (1,))[0])

    @property
    def arithmetic(self) -> str:
        """In words, what its numbers depend on beside the checkpoint, by more than rounding."""
        if not self._rounded_bits:
            return "--compute cpu in float32"
        bits = " and ".join(map(str, self._rounded_bits))
        return f"--compute cpu in float32, activations rounded to int8 at weights of {bits} bits"

    @property
    def layers(self) -> range:
        """One entry per decoder layer."""
        return range(self.config.num_hidden_layers)

    @property
    def on_gpu(self) -> bool:
        """Never, whatever MLX has."""
        return False

    def make_cache(self, form: CacheConfig = FULL_PRECISION) -> list[Cache]:
        """An empty cache of this form for each layer; see `Model.make_cache`."""
        if form.quantized or form.bound is not None:
            # MLX attends to these, on the GPU where it has one.
            width, whole = self.config.head_dim, hardware.refuses_slices()
            return [make_layer_cache(form, width, whole_codes=whole) for _ in self.layers]
        return [CPUCache() for _ in self.layers]

    def _hidden(self, inputs: mx.array, cache: Sequence[Cache | None] | None) -> Floats:
        ids = np.asarray(inputs).astype(np.int64)
        batch, length = ids.shape
        caches: list[Cache] = [
            CPUCache() if given is None else given for given in cache or [None] * len(self.layers)
        ]
        return self._run(ids, batch, caches, self._rotations(batch, length, caches[0].offset))

    def _run(
        self, ids: Any, batch: int, caches: Sequence[Cache], rotations: dict[str, Any]
    ) -> Floats:
        residual = self._embed(ids.reshape(-1))
        if ids.size == 1:
            own = [layer for layer in caches if isinstance(layer, CPUCache)]
            if len(own) == len(caches):
                return self._single_step(residual, rotations, own)
        given = {"residual": residual, **rotations}
        for stage, layer in zip(self._stages[:-1], caches, strict=True):
            queries, keys, values, *changed = stage(given)
            (residual,) = changed or (residual,)
            heads = self._attention(queries, keys, values, batch, layer)
            given = {"heads": heads, "residual": residual, **rotations}
        (hidden,) = self._stages[-1]({"heads": heads, "residual": residual})
        return hidden

    def _rotations(self, batch: int, length: int, offset: Any) -> dict[str, Any]:
        """Cosines and sines of each row's angles, `[rows, head_dim / 2]`, and their numbers."""
        first = np.asarray(offset).reshape(-1, 1)
        positions = np.broadcast_to(first + np.arange(length), (batch, length)).reshape(-1, 1)
        angles = positions.astype(np.float32) * self._radians_per_position
        rows = np.arange(batch * length)[None]
        return {"cos": np.cos(angles), "sin": np.sin(angles), "positions": rows}

    def _logits(self, hidden: Floats, shape: tuple[int, ...]) -> mx.array:
        (logits,) = self._head({"hidden": hidden})
        return mx.array(logits.reshape(*shape, -1))


def _layer_stage(config: ModelConfig, tensors: Tensors, index: int) -> Session:
    """From behind attention `index - 1` to before attention `index`; the ends lack one side."""
    stage = Stage(config)
    update: str | None = None
    if index > 0:
        before = layout.layer(index - 1)
        heads = stage.input("heads", config.num_attention_heads * config.head_dim)
        update = stage.product(heads, tensors.matrix(f"{before}.self_attn.o_proj"))
    residual = stage.input("residual", config.hidden_size)
    if index > 0:
        norm = tensors.floats(f"{before}.feedforward_layernorm.weight")
        residual, x = stage.add_norm(residual, update, norm)
        inner = stage.product(x, tensors.matrix(f"{before}.mlp.up_proj"))
        activated = stage.xielu(inner, *_slopes(tensors, f"{before}.mlp.act_fn"))
        update = stage.product(activated, tensors.matrix(f"{before}.mlp.down_proj"))
    if index == config.num_hidden_layers:
        _, x = stage.add_norm(residual, update, tensors.floats(f"{layout.FINAL_NORM}.weight"))
        stage.output(x)
        return stage.session()
    layer = layout.layer(index)
    norm = tensors.floats(f"{layer}.attention_layernorm.weight")
    residual, x = stage.add_norm(residual, update, norm)
    projections = stage.project_qkv(
        x,
        [tensors.matrix(f"{layer}.self_attn.{name}_proj") for name in "qkv"],
        tensors.floats(f"{layer}.self_attn.q_norm.weight"),
        tensors.floats(f"{layer}.self_attn.k_norm.weight"),
    )
    for value in (*projections, residual) if index > 0 else projections:
        stage.output(value)
    return stage.session()


def _head_stage(config: ModelConfig, tensors: Tensors) -> Session:
    stage = Stage(config)
    hidden = stage.input("hidden", config.hidden_size)
    path = layout.EMBEDDING if config.tie_word_embeddings else layout.HEAD
    stage.output(stage.product(hidden, tensors.matrix(path)))
    return stage.session()


def _slopes(tensors: Tensors, path: str) -> tuple[float, float, float]:
    """`alpha_p`, `alpha_n` and `beta` of xIELU, as they enter its equation."""
    beta, eps = (tensors.scalar(f"{path}.{name}") for name in layout.CONSTANTS)
    raw_p, raw_n = (tensors.scalar(f"{path}.{name}") for name in layout.ALPHAS)
    if abs(eps) > MAX_EPS:
        raise CPUCannotError(
            f"{path}.eps: {eps:g} is not near 0; the CPU path leaves it out: use --compute mlx"
        )
    return _softplus(raw_p), beta + _softplus(raw_n), beta


def _softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))
