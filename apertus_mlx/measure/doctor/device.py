"""What examination and tuning ask of a device; what runs the kernels may be another process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from apertus_mlx.backend.metal.kernel import Kernel


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
