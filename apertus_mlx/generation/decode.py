"""Prefill and the token loop: from prompt ids to new ids, with the cache in between."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import mlx.core as mx

from apertus_mlx.backend.memory_limits import clear_pool
from apertus_mlx.cache import Cache, expect
from apertus_mlx.errors import RejectedError
from apertus_mlx.generation.sampling import Sampler
from apertus_mlx.generation.structured import AnswerRules
from apertus_mlx.model.language_model import LanguageModel, NextTokenLogits

DEFAULT_PREFILL_STEP = 512
# MLX's matrix kernels work on tiles of 32 or 64 rows, and with fewer are slower than their share
# (ml-explore/mlx#3863, #4198).
MIN_CHUNK = 64
# Positions after which MLX's pool of free buffers is emptied, so that it does not grow for ever.
CLEAR_INTERVAL = 256


def prefill(
    model: LanguageModel,
    prompt: Sequence[int],
    cache: Sequence[Cache],
    step: int = DEFAULT_PREFILL_STEP,
    on_chunk: Callable[[int], None] | None = None,
) -> mx.array:
    """Run `prompt` through the model in chunks of up to `step` tokens.

    Returns the logits `[vocabulary]` after the last token; no others are computed (for Apertus'
    vocabulary all of them would take 0.5 GB per 1,000 tokens). `on_chunk` is told the number of
    tokens done after each chunk.
    """
    if not prompt:
        raise ValueError("the prompt is empty")
    ids = mx.array(list(prompt))[None]
    expect(cache, len(prompt))
    done = 0
    for size in chunk_sizes(len(prompt), step):
        chunk = ids[:, done : done + size]
        done += size
        logits = read_chunk(model, chunk, cache, wanted=done == len(prompt))
        if on_chunk is not None:
            on_chunk(done)
    assert logits is not None
    return logits


def read_chunk(
    model: LanguageModel,
    ids: mx.array,
    cache: Sequence[Cache],
    wanted: bool,
    on_hidden: Callable[[mx.array], None] | None = None,
) -> mx.array | None:
    """Run `ids` `[1, L]` through the model; the logits `[vocabulary]` after them, if `wanted`.

    `on_hidden` is told the final hidden states `[1, L, D]`.
    """
    hidden = model.model(ids, cache)
    if on_hidden is not None:
        on_hidden(hidden)
    logits = model.logits(hidden[:, -1:])[0, 0] if wanted else None
    # Only the caches and the last logits are wanted; hidden states of a chunk are not.
    mx.eval([layer.state for layer in cache], [] if logits is None else logits)
    clear_pool()
    return logits


def chunk_sizes(length: int, step: int) -> list[int]:
    """How a prompt of `length` tokens is cut into chunks of up to `step`.

    The last one gets at least `MIN_CHUNK` tokens from the one before, if there is one.
    """
    full, rest = divmod(length, step)
    sizes = [step] * full + [rest] * (rest > 0)
    if full and 0 < rest < MIN_CHUNK <= step // 2:
        sizes[-2:] = [step + rest - MIN_CHUNK, MIN_CHUNK]
    return sizes


def decode(
    model: LanguageModel,
    logits: mx.array,
    cache: Sequence[Cache],
    sampler: Sampler,
    max_tokens: int,
    rules: AnswerRules | None = None,
) -> Iterator[int]:
    """`draw_tokens` on a cache of which nobody asks afterwards what it holds."""
    return draw_tokens(
        lambda token: model.next_token_logits(token.reshape(1, 1), cache),
        logits,
        sampler,
        max_tokens,
        rules,
    )


def draw_tokens(
    step: Callable[[mx.array], NextTokenLogits],
    logits: mx.array,
    sampler: Sampler,
    max_tokens: int,
    rules: AnswerRules | None = None,
) -> Iterator[int]:
    """Yield up to `max_tokens` token ids, the first drawn from `logits` `[vocabulary]`.

    `step` gives the logits after one more token (shape `[]`). It is called before that token is
    read, so that the GPU never waits for Python: when the caller stops, the last token yielded, or
    being read, may therefore have been fed already. Where `rules` depend on the token, it is read
    first; the rules then work while the GPU computes the step.

    Raises:
        RejectedError: the logits of the first token, or of a later one where id 0 was drawn, are
            not finite or all the same. Greedy choice draws 0 from such logits; drawing by chance
            may take any id, so there they can stay unseen after the first token.
        UsageError: the grammar of `rules` became too complex.
    """

    def draw(after: NextTokenLogits) -> tuple[mx.array, NextTokenLogits]:
        token = sampler(after, None if rules is None else rules.allowed)
        mx.async_eval(token)
        return token, after

    token, after = draw(NextTokenLogits(logits))
    sound = tell_apart(logits)
    mx.async_eval(sound)  # known with the first token, before the step after it
    for index in range(max_tokens):
        following = None
        ahead = rules is None or rules.steady
        drawn = sampler.state
        if ahead and index + 1 < max_tokens:
            following = draw(step(token))
        value = int(token)
        # Where the logits tell nothing apart token 0 is drawn by greedy choice, so that after the
        # first time only then a look is worth its while. Rules may not allow 0.
        if index and (value == 0 or (not ahead and not is_finite(after.values, token))):
            sound = tell_apart(after.values)
        if not sound.item():
            raise unsound(index)
        if rules is not None:
            next_logits = None if following is None else following[1]
            if not ahead and index + 1 < max_tokens and not rules.ends_with(value):
                next_logits = step(token)
                mx.async_eval(next_logits.values)
            changed = rules.accept(value)
            if next_logits is not None and (changed or following is None):
                sampler.state = drawn
                following = draw(next_logits)
        yield value
        if following is not None:
            token, after = following
        if index % CLEAR_INTERVAL == CLEAR_INTERVAL - 1:
            clear_pool()


def unsound(index: int) -> RejectedError:
    """What is raised where the logits of token `index` of an answer are of no use."""
    return RejectedError(
        f"the model computed no finite logits, or all equal, at token {index + 1}: its "
        "weights are damaged or overflow in this type; try --dtype float32"
    )


def is_finite(logits: mx.array, token: mx.array) -> bool:
    """Whether the logit of `token` (shape `[]`) is a number."""
    return bool(mx.isfinite(logits[token]).item())


def tell_apart(logits: mx.array) -> mx.array:
    """Whether all logits are numbers, and not all the same one; shape `[]`."""
    finite = mx.isfinite(logits).all()
    return finite if logits.size == 1 else finite & (logits.max() > logits.min())
