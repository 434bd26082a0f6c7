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

from apertus_mlx.backend.metal.compiled_step import CompiledStep
from apertus_mlx.cache import FULL_PRECISION, Cache, CacheConfig, make_layer_cache
from apertus_mlx.cache.protocol import Mask
from apertus_mlx.checkpoint.config import ModelConfig, Rope
from apertus_mlx.model import embedding_row, plain
from apertus_mlx.model.joined_linear import join
from apertus_mlx.model.language_model import NextTokenLogits
from apertus_mlx.model.operations import Operations, Stream


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
        self._folded = self.slopes()
        mx.eval(self._folded)

    def __call__(self, x: mx.array) -> mx.array:
        """Apply to `x` of any shape."""
        return _xielu(x, *(self._folded or self.slopes()))

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


# On a GPU one kernel instead of ten; on the CPU MLX would call a C++ compiler first. Compiled for
# each shape anew, since without known shapes MLX leaves the first cast out of the kernel.
_xielu = xielu if mx.default_device() == mx.cpu else mx.compile(xielu)


class RotaryEmbedding(nn.Module):
    """Rotary position embedding over the whole head, half-rotated (not interleaved)."""

    def __init__(self, head_dim: int, rope: Rope) -> None:
        super().__init__()
        self.head_dim = head_dim
        self._wavelengths = mx.array(rotary_wavelengths(head_dim, rope), mx.float32)

    @property
    def wavelengths(self) -> mx.array:
        """Positions per radian, `[head_dim / 2]`."""
        return self._wavelengths

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
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
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

    @property
    def is_joined(self) -> bool:
        """Whether `qkv_proj` has taken the place of `q_proj`, `k_proj` and `v_proj`."""
        return "qkv_proj" in self

    def fold(self) -> None:
        """Join the three projections of the input, where that changes no number."""
        joined = join((self.q_proj, self.k_proj, self.v_proj))
        if joined is not None:
            del self.q_proj, self.k_proj, self.v_proj
            self.qkv_proj = joined

    def __call__(self, norm: nn.RMSNorm, stream: Stream, mask: Mask, cache: Cache | None) -> Stream:
        """Attend from the normalized `stream` to all positions in `cache` and itself."""
        return self.ops.attend(self, norm, stream, mask, cache)


class MLP(nn.Module):
    """Up projection, xIELU, down projection; Apertus has no gate."""

    def __init__(self, config: ModelConfig, ops: Operations) -> None:
        super().__init__()
        self.ops = ops
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = XIELU()

    def __call__(self, norm: nn.RMSNorm, stream: Stream) -> Stream:
        """Transform each position of the normalized `stream` by itself."""
        return self.ops.feed_forward(self, norm, stream)


class DecoderLayer(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, config: ModelConfig, ops: Operations) -> None:
        super().__init__()
        self.self_attn = Attention(config, ops)
        self.mlp = MLP(config, ops)
        self.attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.feedforward_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def __call__(self, stream: Stream, mask: Mask, cache: Cache | None) -> Stream:
        """The residual stream after this layer."""
        stream = self.self_attn(self.attention_layernorm, stream, mask, cache)
        return self.mlp(self.feedforward_layernorm, stream)


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
        return self.ops.normalize(self.norm, self.stream(inputs, cache))

    def stream(self, inputs: mx.array, cache: Sequence[Cache | None] | None = None) -> Stream:
        """The residual stream behind the last layer."""
        caches = cache if cache is not None else [None] * len(self.layers)
        stream = Stream(self.ops.embed(self.embed_tokens, inputs))
        mask = _mask(inputs.shape[1], caches[0])
        for layer, layer_cache in zip(self.layers, caches, strict=True):
            stream = layer(stream, mask, layer_cache)
        return stream


class Model(nn.Module):
    """A decoder with its head, tied to the embedding or not."""

    def __init__(self, config: ModelConfig, ops: Operations = plain) -> None:
        super().__init__()
        self.config = config
        self.ops = ops
        self.model_type = config.family
        self._compiled_step: CompiledStep | None = None
        self.model = Decoder(config, ops)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.output_vocab_size, bias=False)

    def __call__(self, inputs: mx.array, cache: Sequence[Cache | None] | None = None) -> mx.array:
        """Logits `[B, L, vocabulary]` of the token ids `inputs` `[B, L]`."""
        return self.logits(self.model(inputs, cache))

    def logits(self, hidden: mx.array) -> mx.array:
        """Logits `[B, L, vocabulary]` of final hidden states `[B, L, D]`."""
        return plain.logits(self.head, hidden)

    def next_token_logits(
        self, inputs: mx.array, cache: Sequence[Cache | None] | None = None
    ) -> NextTokenLogits:
        """Logits of the token after the last of `inputs` `[1, L]`."""
        if self._compiled_step is not None and inputs.size == 1:
            logits = self._compiled_step(inputs, cache)
            if logits is not None:
                return logits
        return self.eager_logits(inputs, cache)

    def eager_logits(self, inputs: mx.array, cache: Sequence[Any] | None = None) -> NextTokenLogits:
        """See `next_token_logits`; described to MLX anew, and so for any cache."""
        return self.ops.next_token_logits(
            self.head, self.model.norm, self.model.stream(inputs, cache)
        )

    def use(self, ops: Operations, compiled_step: bool = False) -> None:
        """Compute with other operations from now on; caches made before are not for them.

        `compiled_step`: describe the step of decoding to MLX only once; see `CompiledStep`.
        """
        for _, module in self.named_modules():
            if isinstance(module, Model | Decoder | Attention | MLP):
                module.ops = ops
        self._compiled_step = CompiledStep(self.eager_logits) if compiled_step else None

    def fold(self) -> None:
        """Bring the weights, now final, into the form that is the quickest to compute with."""
        self.model.embed_tokens.by_product = embedding_row.works(self.model.embed_tokens)
        for layer in self.layers:
            layer.self_attn.fold()
            layer.mlp.act_fn.fold()

    @property
    def arithmetic(self) -> str:
        """See `LanguageModel.arithmetic`."""
        return f"--compute mlx in {str(self.model.norm.weight.dtype).removeprefix('mlx.core.')}"

    @property
    def head(self) -> nn.Module:
        """What turns hidden states into logits: the tied embedding or the head's own weights."""
        return self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head

    @property
    def layers(self) -> list[DecoderLayer]:
        """The decoder layers."""
        return self.model.layers

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU computes it: where MLX's default device is one."""
        return bool(mx.default_device() != mx.cpu)

    def make_cache(self, form: CacheConfig = FULL_PRECISION) -> list[Cache]:
        """An empty cache of this form for each layer.

        Raises:
            UsageError: heads of this model cannot be quantized or rotated as `form` asks.
        """
        return [
            make_layer_cache(form, self.config.head_dim, self.ops.joined_rows) for _ in self.layers
        ]


def _mask(length: int, cache: Cache | None) -> Mask:
    if cache is not None:
        return cache.make_mask(length, return_array=False, window_size=None)
    return "causal" if length > 1 else None
