"""The step of one token with fused Metal kernels, where there is one to use; else in plain MLX."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from apertus_mlx.backend.metal.add_rms_norm import AddRMSNorm
from apertus_mlx.backend.metal.attention_input import AttentionInput
from apertus_mlx.backend.metal.best_token import BestToken
from apertus_mlx.backend.metal.kernel import Factory, Kernel, Run, build
from apertus_mlx.backend.metal.qk_norm_rope import QKNormRope
from apertus_mlx.backend.metal.quantized_matvec import Epilogue, Prologue, QuantizedMatvec, unfit
from apertus_mlx.cache import Cache
from apertus_mlx.cache.protocol import Mask
from apertus_mlx.model.apertus import MLP, Attention, Model, make_mask
from apertus_mlx.model.embedding import ProductEmbedding
from apertus_mlx.model.language_model import NextTokenLogits
from apertus_mlx.quant.spec import QuantSpec

# A product with one matrix: from the vector and what prologue and epilogue ask for.
Product = Callable[..., list[mx.array]]


class Stream(NamedTuple):
    """The residual stream `[1, 1, D]`, and what is still to be added to it by whoever comes next.

    The addition is left open because a kernel can do it together with what follows or precedes.
    """

    residual: mx.array
    update: mx.array | None = None


class FusedStep:
    """`Model.next_token_logits` of a single token; see `apertus_mlx.model.apertus.Step`.

    Args:
        kernels: by `Kernel.place`, those that may be used.
        factory: what makes them; by default `mx.fast.metal_kernel`.
    """

    def __init__(self, kernels: Mapping[str, Kernel], factory: Factory | None = None) -> None:
        self._kernels = kernels
        self._factory = factory
        # By what they serve; the modules live as long as the model that uses this step.
        self._runs: dict[tuple[Any, ...], Any] = {}
        self._position: tuple[int, mx.array] = (0, mx.array([0], mx.int32))

    @property
    def joined_rows(self) -> bool:
        """Whether a kernel writes keys and values of a position to the cache together."""
        kernels = self._kernels.values()
        return any(isinstance(kernel, QKNormRope | AttentionInput) for kernel in kernels)

    def __call__(
        self, model: Model, token: mx.array, cache: Sequence[Cache | None] | None
    ) -> NextTokenLogits:
        """Logits after `token` `[1, 1]`."""
        decoder = model.model
        caches = cache if cache is not None else [None] * len(decoder.layers)
        stream = Stream(decoder.embed_tokens(token))
        mask = make_mask(1, caches[0])
        for layer, layer_cache in zip(decoder.layers, caches, strict=True):
            stream = self._attend(
                layer.self_attn, layer.attention_layernorm, stream, mask, layer_cache
            )
            stream = self._feed_forward(layer.mlp, layer.feedforward_layernorm, stream)
        return self._logits(model, decoder.norm, stream)

    def _attend(
        self,
        attention: Attention,
        norm: nn.RMSNorm,
        stream: Stream,
        mask: Mask,
        cache: Cache | None,
    ) -> Stream:
        append = getattr(cache, "append", None)  # which caches from elsewhere have not
        whole = self._attention_input(attention)
        made = None
        if whole is not None and append is not None and cache is not None:
            residual = _sum(stream)
            made = whole(residual, norm.weight, *self._rotary(attention, cache))
        elif attention.is_joined:
            residual, x, product = self._normed_product(attention.qkv_proj, norm, stream, "none")
            qkv = product[0] if product is not None else attention.qkv_proj(x)
            rotate = self._rotation(attention)
            if rotate is not None and append is not None and cache is not None:
                made = rotate([qkv, *self._rotary(attention, cache)])
            else:
                projected = attention.split(qkv)
        else:
            residual, x = self._normed(norm, stream)
            projected = attention.project(x)
        if made is None or append is None:
            mixed = attention.mix(*projected, mask, cache)
        else:
            queries, rows = made
            keys, values = append(rows)
            mixed = attention.attend(queries, keys, values, mask)
        return self._add_product(attention.o_proj, mixed, residual)

    def _feed_forward(self, mlp: MLP, norm: nn.RMSNorm, stream: Stream) -> Stream:
        slopes = self._slopes(mlp)
        residual, x, made = self._normed_product(mlp.up_proj, norm, stream, "xielu", slopes)
        inner = made[0] if made is not None else mlp.act_fn(mlp.up_proj(x))
        return self._add_product(mlp.down_proj, inner, residual)

    def _logits(self, model: Model, norm: nn.RMSNorm, stream: Stream) -> NextTokenLogits:
        _, x, made = self._normed_product(model.head, norm, stream, "peaks")
        if made is None:
            return NextTokenLogits(model.logits(x)[0, 0])
        logits, peaks, tokens = made
        whole = logits.size % peaks.size == 0
        return NextTokenLogits(logits[0, 0], self._best(peaks, tokens), peaks if whole else None)

    def _normed_product(
        self,
        linear: nn.Module,
        norm: nn.RMSNorm,
        stream: Stream,
        epilogue: Epilogue,
        *extra: mx.array,
    ) -> tuple[mx.array, mx.array, list[mx.array] | None]:
        """The residual stream, its norm, and what a kernel makes of that, if there is one.

        A kernel that takes the norm itself is given the stream; that stands for the norm then.
        """
        product = self._product(linear, "rms_norm", epilogue, norm.eps)
        if product is not None:
            residual = _sum(stream)
            return residual, residual, product(residual, norm.weight, *extra)
        residual, x = self._normed(norm, stream)
        product = self._product(linear, "none", epilogue)
        return residual, x, None if product is None else product(x, *extra)

    def _add_product(self, linear: nn.Module, x: mx.array, residual: mx.array) -> Stream:
        product = self._product(linear, "none", "residual")
        if product is None:
            return Stream(residual, linear(x))
        return Stream(product(x, residual)[0])

    def _normed(self, norm: nn.RMSNorm, stream: Stream) -> tuple[mx.array, mx.array]:
        """The residual stream with its update, and its RMS norm."""
        residual, update = stream
        if update is not None:
            run = self._run(AddRMSNorm, residual.size, residual.dtype, norm.eps)
            if run is not None:
                residual, x = run([residual, update, norm.weight])
                return residual, x
        residual = _sum(stream)
        return residual, norm(residual)

    def _best(self, peaks: mx.array, tokens: mx.array) -> mx.array:
        run = self._run(BestToken, peaks.size)
        best = tokens[mx.argmax(peaks)] if run is None else run([peaks, tokens])[0]
        return best.reshape(())

    def _rotation(self, attention: Attention) -> Run | None:
        return self._run(
            QKNormRope,
            attention.heads,
            attention.kv_heads,
            attention.head_dim,
            attention.q_norm.weight.dtype,
            attention.q_norm.eps,
        )

    def _attention_input(self, attention: Attention) -> Product | None:
        if not attention.is_joined:
            return None
        key = (id(attention),)
        if key not in self._runs:
            heads = (attention.heads, attention.kv_heads, attention.head_dim)
            self._runs[key] = self._with_weights(
                AttentionInput, attention.qkv_proj, heads, attention.q_norm.eps
            )
        found: Product | None = self._runs[key]
        return found

    def _rotary(self, attention: Attention, cache: Cache) -> list[mx.array]:
        """What rotation takes beside queries, keys and values."""
        return [
            attention.q_norm.weight,
            attention.k_norm.weight,
            attention.rope.wavelengths,
            self._at(cache.offset),
        ]

    def _product(
        self, linear: nn.Module, prologue: Prologue, epilogue: Epilogue, eps: float = 1e-5
    ) -> Product | None:
        """The kernel for this matrix with its weights, if there is one to use."""
        key = (id(linear), prologue, epilogue)
        if key not in self._runs:
            self._runs[key] = self._with_weights(
                QuantizedMatvec, linear, None, prologue, epilogue, eps
            )
        found: Product | None = self._runs[key]
        return found

    def _with_weights(
        self,
        kind: Callable[..., Kernel],
        linear: nn.Module,
        shape: tuple[int, ...] | None,
        *settings: Any,
    ) -> Product | None:
        """The kernel to use for the format of a matrix and its outputs, with its weights."""
        # No other class: a subclass or a wrapper may compute something else.
        if type(linear) not in (nn.QuantizedLinear, nn.QuantizedEmbedding, ProductEmbedding):
            return None
        spec = QuantSpec(linear.bits, linear.group_size, linear.mode)
        rows, columns = linear.weight.shape[0], linear.weight.shape[1] * 32 // linear.bits
        if unfit(spec, rows, columns) is not None:
            return None
        form = (spec.bits, spec.group_size, columns, *(shape or (rows,)), linear.scales.dtype)
        run = self._run(kind, *form, *settings)
        if run is None:
            return None
        weights = (linear.weight, linear.scales, linear.biases)

        def product(x: mx.array, *extra: mx.array) -> list[mx.array]:
            return run([x, *weights, *extra])

        return product

    def _run(self, kind: Callable[..., Kernel], *arguments: Any) -> Run | None:
        """The kernel to use in the place of this one, if there is one."""
        key = (kind, *arguments)
        if key not in self._runs:
            try:
                chosen = self._kernels.get(kind(*arguments).place)
            except ValueError:  # no such kernel for these sizes
                chosen = None
            self._runs[key] = None if chosen is None else build(chosen, self._factory)
        found: Run | None = self._runs[key]
        return found

    def _slopes(self, mlp: MLP) -> mx.array:
        """Those of xIELU as the kernels read them."""
        key = (id(mlp),)
        if key not in self._runs:
            slopes = mx.concatenate([slope.reshape(1) for slope in mlp.act_fn.slopes()])
            self._runs[key] = mx.pad(slopes, (0, 4))
            mx.eval(self._runs[key])
        found: mx.array = self._runs[key]
        return found

    def _at(self, offset: Any) -> mx.array:
        """The position as an array, made once for all layers of a step."""
        if isinstance(offset, mx.array):
            return offset.reshape(1)
        if self._position[0] != offset:
            self._position = (offset, mx.array([offset], mx.int32))
        return self._position[1]


def _sum(stream: Stream) -> mx.array:
    return stream.residual if stream.update is None else stream.residual + stream.update
