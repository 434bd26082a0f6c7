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
    return mean(*of_tokens(logits, likeliest, shares, following), following, text_share)


def of_tokens(
    logits: mx.array, likeliest: mx.array, shares: mx.array, following: mx.array
) -> tuple[mx.array, mx.array]:
    """The divergence and the cross-entropy of each token, both `[tokens]`; see `loss`.

    A token that nothing follows has no cross-entropy, but 0.
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
    divergences = (shares * (_log(shares) - found)).sum(-1)
    own = mx.take_along_axis(logits, mx.maximum(following, 0)[:, None], axis=-1)
    return divergences, mx.where(following >= 0, (highest + total - own)[:, 0], 0)


def mean(
    divergences: mx.array, surprises: mx.array, following: mx.array, text_share: float
) -> tuple[mx.array, mx.array]:
    """The loss and the divergence in it, of what `of_tokens` says of all tokens."""
    divergence = divergences.mean()
    surprise = surprises.sum() / _count(following)
    return (1 - text_share) * divergence + text_share * surprise, divergence


def slopes(following: mx.array, text_share: float) -> tuple[mx.array, mx.array]:
    """How the loss grows with the divergence and with the cross-entropy of each token."""
    ones = mx.ones(following.shape)
    return ones * ((1 - text_share) / following.size), ones * text_share / _count(following)


def _count(following: mx.array) -> mx.array:
    """Tokens that one follows; at least 1."""
    return mx.maximum((following >= 0).sum(), 1)


def _log(values: mx.array) -> mx.array:
    """Logarithms, finite for zero."""
    return mx.log(mx.maximum(values, mx.finfo(mx.float32).smallest_normal))
