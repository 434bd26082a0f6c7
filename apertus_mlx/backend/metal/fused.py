"""The operations with fused Metal kernels, where there is one to use; else their plain form.

Kernels compute one position of one sequence, which is what decoding asks for. Prompts take the
plain form.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn

from apertus_mlx.backend.metal.add_rms_norm import AddRMSNorm
from apertus_mlx.backend.metal.attention_input import AttentionInput
from apertus_mlx.backend.metal.best_token import BestToken
from apertus_mlx.backend.metal.kernel import Factory, Kernel, Run, build
from apertus_mlx.backend.metal.qk_norm_rope import QKNormRope
from apertus_mlx.backend.metal.quantized_matvec import Epilogue, Prologue, QuantizedMatvec, unfit
from apertus_mlx.model import plain
from apertus_mlx.model.language_model import NextTokenLogits
from apertus_mlx.model.operations import Stream
from apertus_mlx.quant.spec import QuantSpec

if TYPE_CHECKING:
    from apertus_mlx.cache import Cache
    from apertus_mlx.cache.protocol import Mask
    from apertus_mlx.model.apertus import MLP, Attention

# A product with one matrix: from the vector and what prologue and epilogue ask for.
Product = Callable[..., list[mx.array]]


class FusedOperations:
    """See `Operations`.

    Args:
        kernels: by `Kernel.place`, those that may be used.
        factory: what makes them; by default `mx.fast.metal_kernel`.
    """

    def __init__(self, kernels: Mapping[str, Kernel], factory: Factory | None = None) -> None:
        self._kernels = kernels
        self._factory = factory
        # By what they serve; the modules live as long as the model that has these operations.
        self._runs: dict[tuple[Any, ...], Any] = {}
        self._position: tuple[int, mx.array] = (0, mx.array([0], mx.int32))

    @property
    def joined_rows(self) -> bool:
        """See `Operations.joined_rows`."""
        kernels = self._kernels.values()
        return any(isinstance(kernel, QKNormRope | AttentionInput) for kernel in kernels)

    def embed(self, embedding: nn.Module, ids: mx.array) -> mx.array:
        """See `Operations.embed`."""
        return plain.embed(embedding, ids)

    def attend(
        self,
        attention: Attention,
        norm: nn.RMSNorm,
        stream: Stream,
        mask: Mask,
        cache: Cache | None,
    ) -> Stream:
        """See `Operations.attend`."""
        if not _is_one_position(stream):
            return plain.attend(attention, norm, stream, mask, cache)
        append = getattr(cache, "append", None)  # which caches from elsewhere have not
        whole = self._attention_input(attention)
        if whole is not None and append is not None and cache is not None:
            residual = _sum(stream)
            queries, rows = whole(residual, norm.weight, *self._rotary(attention, cache))
            keys, values = append(rows)
            mixed = plain.weigh(attention, queries, keys, values, mask)
        elif attention.is_joined:
            residual, qkv = self._normed_product(attention.qkv_proj, norm, stream)
            mixed = self._mix(attention, qkv, mask, cache)
        else:
            residual, x = self._settle(norm, stream)
            mixed = plain.mix(attention, x, mask, cache)
        return self._add_product(attention.o_proj, mixed, residual)

    def feed_forward(self, mlp: MLP, norm: nn.RMSNorm, stream: Stream) -> Stream:
        """See `Operations.feed_forward`."""
        if not _is_one_position(stream):
            return plain.feed_forward(mlp, norm, stream)
        product = self._product(mlp.up_proj, "rms_norm", "xielu", norm.eps)
        if product is not None:
            residual = _sum(stream)
            inner = product(residual, norm.weight, self._slopes(mlp))[0]
        else:
            residual, x = self._settle(norm, stream)
            product = self._product(mlp.up_proj, "none", "xielu")
            if product is not None:
                inner = product(x, self._slopes(mlp))[0]
            else:
                inner = mlp.act_fn(mlp.up_proj(x))
        return self._add_product(mlp.down_proj, inner, residual)

    def normalize(self, norm: nn.RMSNorm, stream: Stream) -> mx.array:
        """See `Operations.normalize`."""
        if not _is_one_position(stream):
            return plain.normalize(norm, stream)
        return self._settle(norm, stream)[1]

    def next_token_logits(
        self, head: nn.Module, norm: nn.RMSNorm, stream: Stream
    ) -> NextTokenLogits:
        """See `Operations.next_token_logits`."""
        if not _is_one_position(stream):
            return plain.next_token_logits(head, norm, stream)
        product = self._product(head, "rms_norm", "peaks", norm.eps)
        if product is not None:
            found = product(_sum(stream), norm.weight)
        else:
            _, x = self._settle(norm, stream)
            product = self._product(head, "none", "peaks")
            if product is None:
                return NextTokenLogits(plain.logits(head, x)[0, 0])
            found = product(x)
        logits, peaks, tokens = found
        whole = logits.size % peaks.size == 0
        return NextTokenLogits(logits[0, 0], self._best(peaks, tokens), peaks if whole else None)

    def _mix(
        self, attention: Attention, qkv: mx.array, mask: Mask, cache: Cache | None
    ) -> mx.array:
        """See `plain.mix`, from what `qkv_proj` gives."""
        rotate = self._rotation(attention)
        # Caches from elsewhere have no `append`.
        append = getattr(cache, "append", None)
        if rotate is None or cache is None or append is None:
            apart = plain.split(attention, qkv)
            rotated = plain.rotate_and_store(attention, *apart, cache)
            return plain.weigh(attention, *rotated, mask)
        queries, rows = rotate([qkv, *self._rotary(attention, cache)])
        keys, values = append(rows)
        return plain.weigh(attention, queries, keys, values, mask)

    def _normed_product(
        self, linear: nn.Module, norm: nn.RMSNorm, stream: Stream
    ) -> tuple[mx.array, mx.array]:
        """The residual stream, and its norm times a matrix."""
        product = self._product(linear, "rms_norm", "none", norm.eps)
        if product is None:
            residual, x = self._settle(norm, stream)
            return residual, linear(x)
        residual = _sum(stream)
        return residual, product(residual, norm.weight)[0]

    def _add_product(self, linear: nn.Module, x: mx.array, residual: mx.array) -> Stream:
        product = self._product(linear, "none", "residual")
        if product is None:
            return Stream(residual, linear(x))
        return Stream(product(x, residual)[0])

    def _settle(self, norm: nn.RMSNorm, stream: Stream) -> tuple[mx.array, mx.array]:
        """See `plain.settle`."""
        residual, update = stream
        if update is None:
            return plain.settle(norm, stream)
        run = self._run(AddRMSNorm, residual.size, residual.dtype, norm.eps)
        if run is None:
            return plain.settle(norm, stream)
        residual, x = run([residual, update, norm.weight])
        return residual, x

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
            form = (attention.heads, attention.kv_heads, attention.head_dim)
            self._runs[key] = self._with_weights(
                attention.qkv_proj,
                lambda spec, columns, _, dtype: self._run(
                    AttentionInput, spec.bits, spec.group_size, columns, *form, dtype,
                    attention.q_norm.eps,
                ),
            )  # fmt: skip
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
                linear,
                lambda spec, columns, rows, dtype: self._run(
                    QuantizedMatvec, spec.bits, spec.group_size, columns, rows, dtype, prologue,
                    epilogue, eps,
                ),
            )  # fmt: skip
        found: Product | None = self._runs[key]
        return found

    def _with_weights(
        self,
        linear: nn.Module,
        find: Callable[[QuantSpec, int, int, mx.Dtype], Run | None],
    ) -> Product | None:
        """What `find` finds for the format and the shape of a matrix, together with its weights."""
        # No other class: a subclass or a wrapper may compute something else.
        if type(linear) not in (nn.QuantizedLinear, nn.QuantizedEmbedding):
            return None
        spec = QuantSpec(linear.bits, linear.group_size, linear.mode)
        rows, columns = linear.weight.shape[0], linear.weight.shape[1] * 32 // linear.bits
        if unfit(spec, rows, columns) is not None:
            return None
        run = find(spec, columns, rows, linear.scales.dtype)
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


def _is_one_position(stream: Stream) -> bool:
    return bool(stream.residual.size == stream.residual.shape[-1])


def _sum(stream: Stream) -> mx.array:
    return stream.residual if stream.update is None else stream.residual + stream.update
