"""Decides which kernels are right: each by itself, and then all together in the whole model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from apertus_mlx.backend.metal.kernel import Kernel
from apertus_mlx.measure.doctor.device import Agreement, Attempt, Device, UnfitError

# The plain form rounds more often than a fused one, but more than this is another function.
PLAIN_FACTOR = 16
MAX_DIVERGENCE = 0.01


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found out about one kernel; without a reason it is right."""

    kernel: Kernel
    attempt: Attempt | None
    reason: str | None


def examine(
    device: Device, kernels: Sequence[Kernel], on_stage: Callable[[str], None] = lambda _: None
) -> list[Finding]:
    """Run each of `kernels`; one that fails in any way does not keep the others from their turn.

    `on_stage` is told what comes next: should the whole machine hang, that was it.
    """
    findings = []
    for number, kernel in enumerate(kernels, 1):
        on_stage(f"running {number}/{len(kernels)} {kernel.key}")
        try:
            attempt = device.attempt(kernel)
            findings.append(Finding(kernel, attempt, fault(kernel, attempt)))
        except UnfitError as error:
            findings.append(Finding(kernel, None, str(error)))
        if findings[-1].reason is not None:
            on_stage(f"off: {findings[-1].reason}")
    return findings


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


def first_of_each_place(kernels: Sequence[Kernel]) -> dict[str, Kernel]:
    """Place -> the first of `kernels` that may stand there."""
    return {kernel.place: kernel for kernel in reversed(kernels)}


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
