"""Decides what is right: a kernel by itself, and a model with kernels."""

from __future__ import annotations

import math
from collections.abc import Mapping

from apertus_mlx.backend.metal.kernel import Kernel
from apertus_mlx.measure.doctor.device import Agreement, Attempt, Device, UnfitError

# The plain form rounds more often than a fused one, but more than this is another function.
PLAIN_FACTOR = 16
MAX_DIVERGENCE = 0.01


def examine(device: Device, kernel: Kernel) -> tuple[Attempt | None, str | None]:
    """Run `kernel`; what came of it, and what is wrong."""
    try:
        attempt = device.attempt(kernel)
    except UnfitError as error:
        return None, str(error)
    return attempt, fault(kernel, attempt)


def fault(kernel: Kernel, attempt: Attempt) -> str | None:
    """Why `kernel` is not right, or None if it is."""
    if not all(map(math.isfinite, (attempt.error, attempt.plain_error, attempt.difference))):
        return "not finite"
    if attempt.identical < attempt.repeats:
        changed = attempt.repeats - attempt.identical
        return f"unstable: {changed} of {attempt.repeats} repeats gave other bits"
    if attempt.error > kernel.tolerance:
        return f"wrong: error {attempt.error:.1e}, at most {kernel.tolerance:.1e} allowed"
    if attempt.difference > PLAIN_FACTOR * kernel.tolerance:
        return f"differs from the plain form by {attempt.difference:.1e}"
    return None


def examine_model(
    device: Device, kernels: Mapping[str, Kernel], compiled: bool = False
) -> tuple[Agreement | None, str | None]:
    """Compare the model with `kernels` with the plain one; what came of it, and what is wrong."""
    try:
        agreement = device.agreement(kernels, compiled)
    except UnfitError as error:
        return None, str(error)
    return agreement, disagreement(agreement)


def disagreement(agreement: Agreement) -> str | None:
    """Why a model is not the plain one, or None if it is.

    Near ties may fall differently in 16 bits; then the distributions have to be close.
    """
    if not math.isfinite(agreement.error):
        return "logits are not finite"
    if agreement.error > agreement.bound:
        return f"logits differ by {agreement.error:.1e}, at most {agreement.bound:.1e} allowed"
    if agreement.same < agreement.tokens and not agreement.divergence <= MAX_DIVERGENCE:
        other = agreement.tokens - agreement.same
        return f"{other} of {agreement.tokens} greedy tokens differ"
    return None
