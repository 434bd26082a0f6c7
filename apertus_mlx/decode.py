"""Prefill and the token loop: from prompt ids to new ids, with the cache in between."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import mlx.core as mx

from apertus_mlx.cache import Cache, expect
from apertus_mlx.compute import LanguageModel
from apertus_mlx.errors import ApertusError
from apertus_mlx.sampling import Sampler

DEFAULT_PREFILL_STEP = 512
# Positions after which MLX's pool of free buffers is emptied, so that it does not grow for ever.
CLEAR_INTERVAL = 256


def prefill(
    model: LanguageModel,
    prompt: Sequence[int],
    cache: list[Cache],
    step: int = DEFAULT_PREFILL_STEP,
    on_chunk: Callable[[int], None] | None = None,
) -> mx.array:
    """Run `prompt` through the model in chunks of `step` tokens.

    Returns the logits `[vocabulary]` after the last token; no others are computed (for Apertus'
    vocabulary all of them would take 0.5 GB per 1,000 tokens). `on_chunk` is told the number of
    tokens done after each chunk.
    """
    if not prompt:
        raise ValueError("the prompt is empty")
    ids = mx.array(list(prompt))[None]
    expect(cache, len(prompt))
    for start in range(0, len(prompt), step):
        hidden = model.model(ids[:, start : start + step], cache)
        last = start + step >= len(prompt)
        logits = model.logits(hidden[:, -1:])[0, 0] if last else None
        # Only the caches and the last logits are wanted; hidden states of a chunk are not.
        mx.eval([layer.state for layer in cache], [] if logits is None else logits)
        mx.clear_cache()
        if on_chunk is not None:
            on_chunk(min(start + step, len(prompt)))
    assert logits is not None
    return logits


def decode(
    model: LanguageModel, logits: mx.array, cache: list[Cache], sampler: Sampler, max_tokens: int
) -> Iterator[int]:
    """Yield up to `max_tokens` token ids, the first drawn from `logits` `[vocabulary]`.

    The step after is started before a token is read, so that the GPU never waits for Python; when
    the caller stops early, the cache may therefore hold the last token yielded, too.

    Raises:
        ApertusError: the model computed no finite logit for the token drawn.
    """

    def draw(logits: mx.array) -> tuple[mx.array, mx.array]:
        token = sampler(logits)
        drawn = (token, logits[token])
        mx.async_eval(*drawn)
        return drawn

    token, logit = draw(logits)
    for index in range(max_tokens):
        following = None
        if index + 1 < max_tokens:
            following = draw(model(token.reshape(1, 1), cache)[0, 0])
        value = int(token)
        if not mx.isfinite(logit).item():
            raise ApertusError(
                f"the model computed no finite logits at token {index + 1}: its weights are "
                "damaged or overflow in this type; try --dtype float32"
            )
        yield value
        if following is not None:
            token, logit = following
        if index % CLEAR_INTERVAL == CLEAR_INTERVAL - 1:
            mx.clear_cache()
