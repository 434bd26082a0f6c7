"""Apertus: a dense decoder with grouped-query attention, QK-norm and xIELU.

Follows mlx-lm's model interface (`__call__(inputs, cache)`, `layers`, `make_cache`), so its tools
run this model too. The arithmetic that other hardware may want to fuse is called by name through
`ops`; `ops/plain.py` spells it out.

Sources: "Apertus: Democratizing Open and Compliant LLMs for Global Language Environments"
(arXiv 2509.14233); xIELU: "Deriving Activation Functions Using Integration" (arXiv 2411.13010).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from apertus_mlx.cache import FULL_PRECISION, Cache, CacheConfig, make_layer_cache
from apertus_mlx.cache.protocol import Mask
from apertus_mlx.config import ModelConfig, Rope
from apertus_mlx.ops import Operations, plain


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
        self._folded: tuple[mx.array, ...] | None = None

    def fold(self) -> None:
        """Compute the slopes once; call after the weights are final."""
        self._folded = self._constants()
        mx.eval(self._folded)

    def __call__(self, x: mx.array) -> mx.array:
        """Apply to `x` of any shape."""
        return _xielu(x, *(self._folded or self._constants()))

    def _constants(self) -> tuple[mx.array, ...]:
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


# On a GPU one kernel instead of ten; on the CPU MLX would call a C++ compiler first.
_xielu = xielu if mx.default_device() == mx.cpu else mx.compile(xielu, shapeless=True)


class RotaryEmbedding(nn.Module):
    """Rotary position embedding over the whole head, half-rotated (not interleaved)."""

    def __init__(self, head_dim: int, rope: Rope) -> None:
        super().__init__()
        self.head_dim = head_dim
        self._wavelengths = mx.array(rotary_wavelengths(head_dim, rope), mx.float32)

    def __call__(self, x: mx.array, offset: Any) -> mx.array:
        """Rotate `x` `[B, heads, L, head_dim]`, whose first position is `offset`."""
        return mx.fast.rope(
            x,
            self.head_dim,
            traditional=False,
            base=None,
            scale=1.0,
            offset=offset,
            freqs=self._wavelengths,
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

    def __init__(self, config: ModelConfig, ops: Operations) -> None:
        super().__init__()
        self.ops = ops
        self.head_dim = config.head_dim
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
        """Attend from `x` `[B, L, D]` to all positions in `cache` and itself."""
        queries, keys, values = self.ops.project_qkv(self, x)
        queries, all_keys, all_values = self.ops.rotate_and_store(
            self, queries, keys, values, cache
        )
        return self.ops.attend(self, queries, all_keys, all_values, mask)


class MLP(nn.Module):
    """Up projection, xIELU, down projection; Apertus has no gate."""

    def __init__(self, config: ModelConfig, ops: Operations) -> None:
        super().__init__()
        self.ops = ops
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = XIELU()

    def __call__(self, x: mx.array) -> mx.array:
        """Transform each position of `x` `[B, L, D]` by itself."""
        return self.ops.feed_forward(self, x)


class DecoderLayer(nn.Module):
    """Pre-norm attention and feed-forward; the last addition is left to whoever comes next."""

    def __init__(self, config: ModelConfig, ops: Operations) -> None:
        super().__init__()
        self.ops = ops
        self.self_attn = Attention(config, ops)
        self.mlp = MLP(config, ops)
        self.attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.feedforward_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def __call__(
        self, residual: mx.array, update: mx.array | None, mask: Mask, cache: Cache | None
    ) -> tuple[mx.array, mx.array]:
        """Take the residual stream `[B, L, D]` and its pending update; return both anew."""
        residual, x = self.ops.add_norm(residual, update, self.attention_layernorm)
        update = self.self_attn(x, mask, cache)
        residual, x = self.ops.add_norm(residual, update, self.feedforward_layernorm)
        return residual, self.mlp(x)


class Decoder(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, config: ModelConfig, ops: Operations) -> None:
        super().__init__()
        self.ops = ops
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [DecoderLayer(config, ops) for _ in range(config.num_hidden_layers)]
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def __call__(self, inputs: mx.array, cache: Sequence[Cache | None] | None = None) -> mx.array:
        """Final hidden states `[B, L, D]` of the token ids `inputs` `[B, L]`."""
        caches = cache if cache is not None else [None] * len(self.layers)
        residual: mx.array = self.embed_tokens(inputs)
        update: mx.array | None = None
        mask = _mask(inputs.shape[1], caches[0])
        for layer, layer_cache in zip(self.layers, caches, strict=True):
            residual, update = layer(residual, update, mask, layer_cache)
        return self.ops.add_norm(residual, update, self.norm)[1]


class Model(nn.Module):
    """A decoder with its head, tied to the embedding or not."""

    def __init__(self, config: ModelConfig, ops: Operations = plain) -> None:
        super().__init__()
        self.config = config
        self.ops = ops
        self.model_type = config.family
        self.model = Decoder(config, ops)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.output_vocab_size, bias=False)

    def __call__(self, inputs: mx.array, cache: Sequence[Cache | None] | None = None) -> mx.array:
        """Logits `[B, L, vocabulary]` of the token ids `inputs` `[B, L]`."""
        return self.logits(self.model(inputs, cache))

    def logits(self, hidden: mx.array) -> mx.array:
        """Logits `[B, L, vocabulary]` of final hidden states `[B, L, D]`."""
        tied = self.config.tie_word_embeddings
        return self.ops.head(self.model.embed_tokens if tied else self.lm_head, hidden)

    @property
    def layers(self) -> list[DecoderLayer]:
        """The decoder layers."""
        return self.model.layers

    def make_cache(self, form: CacheConfig = FULL_PRECISION) -> list[Cache]:
        """An empty cache of this form for each layer.

        Raises:
            UsageError: heads of this model cannot be quantized or rotated as `form` asks.
        """
        return [make_layer_cache(form, self.config.head_dim) for _ in self.layers]


def _mask(length: int, cache: Cache | None) -> Mask:
    if cache is not None:
        return cache.make_mask(length, return_array=False, window_size=None)
    return "causal" if length > 1 else None
