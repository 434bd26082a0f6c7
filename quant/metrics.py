"""How far one next-token distribution is from another. NumPy only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from apertus_mlx.quant.arrays import Float32, Float64

# Standard errors on either side of a mean between which it lies with 95 %.
MARGIN = 1.96
# A token is confident where the reference gives its likeliest next token at least this much.
CONFIDENT = 0.9


class TokenErrors(NamedTuple):
    """Per token: divergence in nats, agreement, and the reference's confidence, each `[tokens]`.

    The acceptance is what both distributions have in common, the sum of the smaller probabilities.
    The losses are those of the token that follows in the text, in nats; NaN where none follows.
    """

    divergence: Float64
    agrees: npt.NDArray[np.bool_]
    acceptance: Float64
    confidence: Float64
    reference_loss: Float64
    loss: Float64


@dataclass(frozen=True, slots=True)
class Divergence:
    """A summary of `TokenErrors`; KL divergences in nats, from the reference to the model."""

    tokens: int
    kl_mean: float
    kl_median: float
    kl_p90: float
    # Over the confident tokens (`CONFIDENT`); None where there are none.
    kl_confident: float | None
    top1_agreement: float
    # None where no token is followed by another.
    perplexity: float | None
    perplexity_difference: float | None
    # How often the reference, at temperature 1, can at best accept what the model drafts.
    acceptance: float
    # Half of the 95 % confidence interval of `kl_mean`, if each token is a sample by itself; None
    # of a single token.
    kl_margin: float | None


def compare(reference: Float32, model: Float32, following: npt.NDArray[np.int64]) -> TokenErrors:
    """Compare logits `[tokens, vocabulary]` of a reference and a model for the same text.

    Args:
        reference: what should be.
        model: what is.
        following: the id of the token that follows each, -1 where none does.
    """
    (expected, shares), (found, own_shares) = (_softmax(each) for each in (reference, model))
    rows = np.arange(len(following))
    known = following >= 0
    reference_loss, loss = (
        np.where(known, -table[rows, np.maximum(following, 0)], np.nan)
        for table in (expected, found)
    )
    agrees = reference.argmax(-1) == model.argmax(-1)
    # In place: of a large vocabulary each array is a megabyte and more.
    expected -= found
    divergence = np.einsum("tv,tv->t", shares, expected)
    acceptance = np.minimum(shares, own_shares, out=own_shares).sum(-1)
    confidence = shares.max(-1)
    return TokenErrors(
        np.maximum(divergence, 0), agrees, acceptance, confidence, reference_loss, loss
    )


def log_softmax(logits: Float32) -> Float64:
    """Log-probabilities in float64."""
    return _softmax(logits)[0]


def _softmax(logits: Float32) -> tuple[Float64, Float64]:
    """Log-probabilities and probabilities in float64."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(-1, keepdims=True)
    shares = np.exp(shifted)
    total = shares.sum(-1, keepdims=True)
    shifted -= np.log(total)
    shares /= total
    return shifted, shares


def join(parts: list[TokenErrors]) -> TokenErrors:
    """The tokens of all parts, in order."""
    return TokenErrors(*map(np.concatenate, zip(*parts, strict=True)))


def summarise(errors: TokenErrors) -> Divergence:
    """Averages and quantiles over at least one token.

    Raises:
        ValueError: there are no tokens.
    """
    if not len(errors.divergence):
        raise ValueError("no tokens to compare")
    sure = errors.divergence[errors.confidence >= CONFIDENT]
    known = ~np.isnan(errors.loss)
    perplexity = difference = None
    if known.any():
        perplexity = float(np.exp(errors.loss[known].mean()))
        difference = perplexity - float(np.exp(errors.reference_loss[known].mean()))
    return Divergence(
        len(errors.divergence),
        float(errors.divergence.mean()),
        float(np.median(errors.divergence)),
        float(np.quantile(errors.divergence, 0.9)),
        float(sure.mean()) if sure.size else None,
        float(errors.agrees.mean()),
        perplexity,
        difference,
        float(errors.acceptance.mean()),
        _margin(errors.divergence),
    )


def _margin(values: Float64) -> float | None:
    if len(values) < 2:
        return None
    return float(MARGIN * values.std(ddof=1) / np.sqrt(len(values)))
