"""Small quantized models whose decode step is counted: ours with some of its kernels, and mlx-lm's.

What a step starts depends on the number of layers, and on no other size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from apertus_mlx.backend.metal.fused import FusedStep
from apertus_mlx.backend.metal.needed import kernels_for
from apertus_mlx.cache import Cache
from apertus_mlx.checkpoint.config import parse_config
from apertus_mlx.generation.sampling import Sampler, SamplingParams
from apertus_mlx.model.apertus import Model, Step
from apertus_mlx.model.embedding import ProductEmbedding
from apertus_mlx.model.language_model import NextTokenLogits
from apertus_mlx.quant.spec import QuantSpec
from tests.dispatch_count import Dispatches, count_dispatches

SPEC = QuantSpec(4, 32)


def build(
    values: Mapping[str, Any],
    accepted: Callable[[str], bool] | None = None,
    dtype: mx.Dtype = mx.bfloat16,
    step: Step | None = None,
    compiled_activation: bool = False,
) -> Model:
    """A random model of this config, with those of its kernels whose place `accepted` accepts."""
    config = parse_config(values)
    bare = Model(config)
    nn.quantize(bare, SPEC.group_size, SPEC.bits)
    specs = {path: SPEC for path, part in bare.named_modules() if "scales" in part}
    chosen = {}
    for kernel in kernels_for(config, specs, dtype) if accepted else ():
        if accepted and accepted(kernel.place):
            chosen.setdefault(kernel.place, kernel)
    model = Model(config)
    model.use(step or (FusedStep(chosen) if chosen else None))
    model.set_dtype(dtype)
    nn.quantize(model, SPEC.group_size, SPEC.bits)
    mx.eval(model.parameters())
    model.fuse(compiled_activation)
    return model


class JoinedPlain:
    """The plain step, with caches that hold keys and values in one buffer."""

    joined_rows = True

    def __call__(
        self, model: Model, token: mx.array, cache: Sequence[Cache | None] | None
    ) -> NextTokenLogits:
        return NextTokenLogits(model.logits(model.model(token, cache))[0, 0])


def our_dispatches(model: Model) -> Dispatches:
    """Of one greedy step."""
    # MLX's product with a row is not exact in 16 bits on a CPU, so that it would not be used here.
    model.model.embed_tokens = ProductEmbedding(model.model.embed_tokens)
    caches = model.make_cache()
    mx.eval(model(mx.array([[1, 2, 3]]), caches), [cache.state for cache in caches])
    sampler = Sampler(SamplingParams(temperature=0), [], model.config.vocab_size)
    return count_dispatches(
        lambda: [sampler(model.next_token_logits(mx.array([[5]], mx.uint32), caches))]
    )


def mlx_lm_dispatches(values: Mapping[str, Any]) -> Dispatches:
    """Of one step, which computes the logarithms of all probabilities, too."""
    from mlx_lm.models import apertus
    from mlx_lm.models.cache import KVCache

    model = apertus.Model(apertus.ModelArgs.from_dict(dict(values)))
    model.set_dtype(mx.bfloat16)
    for layer in model.layers:
        # Stored in 16 bits; mlx-lm makes them in 32 if they are missing.
        for name in ("beta", "eps"):
            setattr(layer.mlp.act_fn, name, getattr(layer.mlp.act_fn, name).astype(mx.bfloat16))
    nn.quantize(model, SPEC.group_size, SPEC.bits)
    mx.eval(model.parameters())
    caches = [KVCache() for _ in model.layers]
    mx.eval(model(mx.array([[1, 2, 3]]), caches))

    def step() -> list[mx.array]:
        logits = model(mx.array([[5]]), caches)[:, -1, :]
        logprobs = logits - mx.logsumexp(logits, keepdims=True)
        return [mx.argmax(logprobs, axis=-1), logprobs]

    return count_dispatches(step)
