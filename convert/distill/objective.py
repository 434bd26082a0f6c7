"""The loss of distillation: divergence from a teacher of whom only the likeliest tokens are known.

The teacher's distribution comes as the shares of its `k` likeliest tokens and one share for all
others together. Its divergence from the student's, put into the same `k + 1` parts, never exceeds
that of the whole distributions, and equals it where the student spreads the rest as the teacher.
"""

from __future__ import annotations

import mlx.core as mx


def loss(
    logits: mx.array,
    likeliest: mx.array,
    shares: mx.array,
    following: mx.array,
    text_share: float,
) -> tuple[mx.array, mx.array]:
    """The loss and the divergence in it, means over tokens in nats.

    The loss is `(1 - text_share) * KL(teacher || student) + text_share * cross-entropy`.

    Args:
        logits: the student's, `[tokens, vocabulary]`, float32.
        likeliest: ids of the teacher's likeliest tokens, `[tokens, k]` with k < vocabulary.
        shares: their probabilities and that of all others, `[tokens, k + 1]`.
        following: the token that follows in the text, -1 where none does.
        text_share: how much the text itself counts beside the teacher.
    """
    # One exponential for everything: of all that is computed here it takes the longest.
    highest = mx.stop_gradient(logits.max(-1, keepdims=True))
    powers = mx.exp(logits - highest)
    total = mx.log(powers.sum(-1, keepdims=True))
    # The rest is summed up by itself: as one minus the others it would be rounding noise.
    rest = mx.put_along_axis(powers, likeliest, mx.array(0.0), axis=-1).sum(-1, keepdims=True)
    named = mx.take_along_axis(logits, likeliest, axis=-1) - highest
    found = mx.concatenate([named, _log(rest)], axis=-1) - total
    # A share of zero adds nothing, whatever the logarithms.
    divergence = (shares * (_log(shares) - found)).sum(-1).mean()
    known = following >= 0
    own = mx.take_along_axis(logits, mx.maximum(following, 0)[:, None], axis=-1)
    surprise = mx.where(known, (highest + total - own)[:, 0], 0).sum() / mx.maximum(known.sum(), 1)
    return (1 - text_share) * divergence + text_share * surprise, divergence


def _log(values: mx.array) -> mx.array:
    """Logarithms, finite for zero."""
    return mx.log(mx.maximum(values, mx.finfo(mx.float32).smallest_normal))
