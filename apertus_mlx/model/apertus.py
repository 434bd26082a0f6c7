"""Apertus: a dense decoder with grouped-query attention, QK-norm and xIELU.

Follows mlx-lm's model interface (`__call__(inputs, cache)`, `layers`, `make_cache`), so its tools
run this model too. Everything is plain MLX as the equations stand. Quicker forms come from outside:
`Model.use` takes another way to compute the step of one token.

Sources: "Apertus: Democratizing Open and Compliant LLMs for Global Language Environments"
(arXiv 2509.14233); xIELU: "Deriving Activation Functions Using Integration" (arXiv 2411.13010).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn

from apertus_mlx.cache import FULL_PRECISION, Cache, CacheConfig, make_layer_cache
from apertus_mlx.cache.attention import attend
from apertus_mlx.cache.protocol import Mask, Stored
from apertus_mlx.checkpoint.config import ModelConfig, Rope
from apertus_mlx.model.embedding import ProductEmbedding
from apertus_mlx.model.language_model import NextTokenLogits
from apertus_mlx.model.linear import join


class XIELU(nn.Module):
    """xIELU with trainable slopes, computed in float32 whatever the input's type.

    x > 0: alpha_p x^2 + beta x;  x <= 0: alpha_n (expm1(min(x, eps)) - x) + beta x, where the
    alphas are softplus of what is stored and alpha_n has beta added. With the slopes of trained
    models (up to 170) 16-bit arithmetic loses a fifth of the negative branch.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alpha_p = mx.full((1,), math.log(math.expm1(0.8)))
        self.alpha_n = mx.full((1,), math.log(math.expm1(0.8 - 0.5)))
        self.beta = mx.array(0.5)
        self.eps = mx.array(-1e-6)
        self._slopes: tuple[mx.array, ...] | None = None
        self._apply = xielu

    def fuse(self, compiled: bool) -> None:
        """Compute the slopes once; call after the weights are final.

        `compiled`: apply it as one kernel, not ten. On a CPU MLX would call a C++ compiler first.
        """
        self._slopes = self.slopes()
        self._apply = compiled_xielu if compiled else xielu
        mx.eval(self._slopes)

    def __call__(self, x: mx.array) -> mx.array:
        """Apply to `x` of any shape."""
        return self._apply(x, *(self._slopes or self.slopes()))

    def slopes(self) -> tuple[mx.array, ...]:
        """`alpha_p`, `alpha_n`, `beta` and `eps` as they stand in the equation, in float32."""
        beta, eps = self.beta.astype(mx.float32), self.eps.astype(mx.float32)
        alpha_p = _softplus(self.alpha_p.astype(mx.float32))
        alpha_n = beta + _softplus(self.alpha_n.astype(mx.float32))
        return alpha_p, alpha_n, beta, eps


def _softplus(x: mx.array) -> mx.array:
    return mx.logaddexp(x, 0.0)


def xielu(
    x: mx.array, alpha_p: mx.array, alpha_n: mx.array, beta: mx.array, eps: mx.array
) -> mx.array:
    """The activation itself, from final slopes; result in the type of `x`."""
    y = x.astype(mx.float32)
    positive = alpha_p * mx.square(y)
    negative = alpha_n * (mx.expm1(mx.minimum(y, eps)) - y)
    return (mx.where(y > 0, positive, negative) + beta * y).astype(x.dtype)


# For each shape anew: without known shapes MLX leaves the first cast out of the kernel.
compiled_xielu = mx.compile(xielu)


class RotaryEmbedding(nn.Module):
    """Rotary position embedding over the whole head, half-rotated (not interleaved)."""

    def __init__(self, head_dim: int, rope: Rope) -> None:
        super().__init__()
        self._wavelengths = mx.array(rotary_wavelengths(head_dim, rope), mx.float32)

    @property
    def wavelengths(self) -> mx.array:
        """Positions per radian, `[head_dim / 2]`."""
        return self._wavelengths

    def __call__(self, x: mx.array, offset: Any) -> mx.array:
        """Rotate `x` `[B, heads, L, head_dim]`, whose first position is `offset`."""
        return rotated(x, self._wavelengths, offset)


def rotated(x: mx.array, wavelengths: mx.array, offset: Any) -> mx.array:
    """Rotary embedding of `x` `[B, heads, L, head_dim]`, whose first position is `offset`."""
    return mx.fast.rope(
        x,
        x.shape[-1],
        traditional=False,
        base=None,
        scale=1.0,
        offset=offset,
        freqs=wavelengths,
    )


def rotary_wavelengths(head_dim: int, rope: Rope) -> list[float]:
    """Positions per radian of each of the `head_dim / 2` rotations (what MLX calls freqs).

    `llama3` stretches long waves by `factor`, leaves short ones, and blends between (Llama 3.1).
    """
    plain_waves = [rope.theta ** (2 * i / head_dim) for i in range(head_dim // 2)]
    if rope.type == "default":
        return plain_waves
    if rope.type == "linear":
        return [wave * rope.factor for wave in plain_waves]
    stretched = []
    for wave in plain_waves:
        turns = rope.original_max_position_embeddings / (2 * math.pi * wave)
        share = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        kept = min(max(share, 0.0), 1.0)
        stretched.append(wave / ((1 - kept) / rope.factor + kept))
    return stretched


class Attention(nn.Module):
    """Grouped-query attention with RMS-normalized queries and keys."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        self.scale = config.head_dim**-0.5
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)
        self.rope = RotaryEmbedding(config.head_dim, config.rope)

    def __call__(self, x: mx.array, mask: Mask, cache: Cache | None) -> mx.array:
        """Attend from `x` `[B, L, D]` to all positions in `cache` and itself; the same shape."""
        return self.o_proj(self.mix(*self.project(x), mask, cache))

    def mix(
        self, queries: mx.array, keys: mx.array, values: mx.array, mask: Mask, cache: Cache | None
    ) -> mx.array:
        """The heads' outputs `[B, L, heads * head_dim]`, from what `project` returns."""
        offset = 0 if cache is None else cache.offset
        queries = self.rope(self.q_norm(queries).transpose(0, 2, 1, 3), offset)
        keys = self.rope(self.k_norm(keys).transpose(0, 2, 1, 3), offset)
        values = values.transpose(0, 2, 1, 3)
        if cache is None:
            return self.attend(queries, keys, values, mask)
        # All of them so far: arrays, or parts of which some are quantized.
        return self.attend(queries, *cache.update_and_fetch(keys, values), mask)

    def attend(self, queries: mx.array, keys: Stored, values: Stored, mask: Mask) -> mx.array:
        """The heads' outputs `[B, L, heads * head_dim]`, from rotated queries and keys."""
        batch, _, length, _ = queries.shape
        output = attend(queries, keys, values, self.scale, mask)
        return output.transpose(0, 2, 1, 3).reshape(batch, length, -1)

    def project(self, x: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """Queries `[B, L, heads, head_dim]`, keys and values `[B, L, kv_heads, head_dim]`."""
        if self.is_joined:
            return self.split(self.qkv_proj(x))
        queries, keys, values = (
            projection(x).reshape(*x.shape[:2], -1, self.head_dim)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        return queries, keys, values

    def split(self, qkv: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """What `project` returns, of the output of `qkv_proj`."""
        rows = qkv.reshape(*qkv.shape[:2], -1, self.head_dim)
        queries, keys, values = mx.split(rows, [self.heads, self.heads + self.kv_heads], axis=2)
        return queries, keys, values

    @property
    def is_joined(self) -> bool:
        """Whether `qkv_proj` has taken the place of `q_proj`, `k_proj` and `v_proj`."""
        return "qkv_proj" in self

    def fuse(self) -> None:
        """Join the three projections of the input, where that changes no number."""
        joined = join((self.q_proj, self.k_proj, self.v_proj))
        if joined is not None:
            del self.q_proj, self.k_proj, self.v_proj
            self.qkv_proj = joined


class MLP(nn.Module):
    """Up projection, xIELU, down projection; Apertus has no gate."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = XIELU()

    def __call__(self, x: mx.array) -> mx.array:
        """Transform each position of `x` `[B, L, D]` by itself; the same shape."""
        return self.down_proj(self.act_fn(self.up_proj(x)))


class DecoderLayer(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.feedforward_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def __call__(self, x: mx.array, mask: Mask, cache: Cache | None) -> mx.array:
        """The residual stream `x` `[B, L, D]` after this layer."""
        x = x + self.self_attn(self.attention_layernorm(x), mask, cache)
        return x + self.mlp(self.feedforward_layernorm(x))


class Decoder(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens: nn.Module = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [DecoderLayer(config) for _ in range(config.num_hidden_layers)]
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def __call__(self, inputs: mx.array, cache: Sequence[Cache | None] | None = None) -> mx.array:
        """Final hidden states `[B, L, D]` of the token ids `inputs` `[B, L]`."""
        caches = cache if cache is not None else [None] * len(self.layers)
        x = self.embed_tokens(inputs)
        mask = make_mask(inputs.shape[1], caches[0])
        for layer, layer_cache in zip(self.layers, caches, strict=True):
            x = layer(x, mask, layer_cache)
        hidden: mx.array = self.norm(x)
        return hidden


def make_mask(length: int, cache: Cache | None) -> Mask:
    """Which positions `length` new queries see; the same in all layers."""
    if cache is not None:
        return cache.make_mask(length, return_array=False, window_size=None)
    return "causal" if length > 1 else None


class Step(Protocol):
    """Another way to compute what `Model.next_token_logits` says of a single token."""

    @property
    def joined_rows(self) -> bool:
        """Whether it writes keys and values of a position to the cache together."""

    def __call__(
        self, model: Model, token: mx.array, cache: Sequence[Cache | None] | None
    ) -> NextTokenLogits:
        """Logits after `token` `[1, 1]`."""


class Model(nn.Module):
    """A decoder with its head, tied to the embedding or not.

    Attributes:
        on_gpu: whether a GPU computes it; whoever loads it says so.
        whole_codes: whether products with codes of a cache refuse slices; likewise.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model_type = config.family
        self.on_gpu = False
        self.whole_codes = False
        self._step: Step | None = None
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.output_vocab_size, bias=False)

    def __call__(self, inputs: mx.array, cache: Sequence[Cache | None] | None = None) -> mx.array:
        """Logits `[B, L, vocabulary]` of the token ids `inputs` `[B, L]`."""
        if self._step is not None and inputs.size == 1:
            return self._step(self, inputs, cache).values[None, None]
        return self.logits(self.model(inputs, cache))

    def logits(self, hidden: mx.array) -> mx.array:
        """Logits `[B, L, vocabulary]` of final hidden states `[B, L, D]`."""
        head = self.head.as_linear if self.config.tie_word_embeddings else self.head
        logits: mx.array = head(hidden)
        return logits

    def next_token_logits(
        self, inputs: mx.array, cache: Sequence[Cache | None] | None = None
    ) -> NextTokenLogits:
        """Logits of the token after the last of `inputs` `[1, L]`."""
        if self._step is not None and inputs.size == 1:
            return self._step(self, inputs, cache)
        return NextTokenLogits(self.logits(self.model(inputs, cache)[:, -1:])[0, 0])

    def use(self, step: Step | None) -> None:
        """Compute single tokens by `step` from now on, or as this file says (None).

        Caches made before are not for it.
        """
        self._step = step

    def fuse(self, compiled_activation: bool = False, row_by_product: bool = True) -> None:
        """Bring the weights, now final, into the form that is the quickest to compute with.

        Matrices that are joined lose their own names among the parameters. For
        `compiled_activation` see `XIELU.fuse`, for `row_by_product` `ProductEmbedding`.
        """
        if row_by_product and ProductEmbedding.is_exact(self.model.embed_tokens):
            self.model.embed_tokens = ProductEmbedding(self.model.embed_tokens)
        for layer in self.layers:
            layer.self_attn.fuse()
            layer.mlp.act_fn.fuse(compiled_activation)

    @property
    def arithmetic(self) -> str:
        """In words, what its numbers depend on beside the checkpoint, by more than rounding."""
        return f"--compute mlx in {str(self.model.norm.weight.dtype).removeprefix('mlx.core.')}"

    @property
    def head(self) -> nn.Module:
        """What turns hidden states into logits: the tied embedding or the head's own weights."""
        return self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head

    @property
    def layers(self) -> list[DecoderLayer]:
        """The decoder layers."""
        return self.model.layers

    def make_cache(self, form: CacheConfig = FULL_PRECISION) -> list[Cache]:
        """An empty cache of this form for each layer.

        Raises:
            UsageError: heads of this model cannot be quantized or rotated as `form` asks.
        """
        joined = self._step is not None and self._step.joined_rows
        width, whole = self.config.head_dim, self.whole_codes
        return [make_layer_cache(form, width, joined, whole) for _ in self.layers]
