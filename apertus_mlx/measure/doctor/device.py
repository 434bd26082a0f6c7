"""What a doctor asks of a device, which may be in another process, and which answers are right."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from apertus_mlx.backend.metal.kernel import Kernel

# The plain form rounds more often than a fused one, but more than this is another function.
PLAIN_FACTOR = 16
MAX_DIVERGENCE = 0.01


class UnfitError(Exception):
    """A kernel, or a set of them, could not be run; the text says why."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """What came of running one kernel. Errors are relative to the norm of the exact outputs."""

    repeats: int
    # Repeats whose outputs had the same bits as those of the first.
    identical: int
    # Of the kernel, and of the plain form, against float64.
    error: float
    plain_error: float
    # Between the two.
    difference: float

    def fault(self, tolerance: float) -> str | None:
        """Why a kernel with this tolerance is not right, or None if it is."""
        if not all(map(math.isfinite, (self.error, self.plain_error, self.difference))):
            return "not finite"
        if self.identical < self.repeats:
            changed = self.repeats - self.identical
            return f"unstable: {changed} of {self.repeats} repeats gave other bits"
        if self.error > tolerance:
            return f"wrong: error {self.error:.1e}, at most {tolerance:.1e} allowed"
        if self.difference > PLAIN_FACTOR * tolerance:
            return f"differs from the plain form by {self.difference:.1e}"
        return None


@dataclass(frozen=True, slots=True)
class Agreement:
    """How a model with kernels follows the plain one over the latter's greedy tokens."""

    tokens: int
    # Positions where both would have chosen the same token.
    same: int
    # Largest difference of logits at any position, relative to the norm of the plain ones.
    error: float
    # Mean Kullback-Leibler divergence in nats, of the model with kernels from the plain one.
    divergence: float
    # How large `error` may be in the type that is computed in.
    bound: float

    def fault(self) -> str | None:
        """Why the model with kernels is not the plain one, or None if it is.

        Near ties may fall differently in 16 bits; then the distributions have to be close.
        """
        if not math.isfinite(self.error):
            return "logits are not finite"
        if self.error > self.bound:
            return f"logits differ by {self.error:.1e}, at most {self.bound:.1e} allowed"
        if self.same < self.tokens and not self.divergence <= MAX_DIVERGENCE:
            return f"{self.tokens - self.same} of {self.tokens} greedy tokens differ"
        return None


class Device(Protocol):
    """Everything may raise `UnfitError`."""

    def attempt(self, kernel: Kernel) -> Attempt:
        """Compile and run `kernel`."""

    def seconds(self, kernel: Kernel, fused: bool) -> float:
        """Time of one call of `kernel`, or of its plain form, in a chain of dependent calls."""

    def agreement(self, kernels: Mapping[str, Kernel], compiled: bool = False) -> Agreement:
        """Compare the whole model with `kernels` (by place) with the plain one.

        `compiled`: where MLX is told only once what a step is.
        """

    def step_seconds(self, kernels: Mapping[str, Kernel], compiled: bool = False) -> float:
        """Time of one decode step of the whole model with `kernels` (by place).

        `compiled`: where MLX is told only once what a step is.
        """
