"""The loss of distillation: KL divergence from the `k` likeliest tokens of a teacher.

The teacher's distribution is given by the probabilities of its `k` likeliest tokens and their rest.
The student's is put into the same `k + 1` parts. The divergence of the parts never exceeds the
divergence of the whole distributions. It equals it where both spread the rest alike.
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
        shares: their probabilities and the rest, `[tokens, k + 1]`.
        following: the token that follows in the text, -1 where none does.
        text_share: how much the text itself counts beside the teacher.
    """
    # One exponential for everything: it takes the longest.
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
