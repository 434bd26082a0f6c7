"""Decides which of the right kernels are faster than plain MLX, and which is best at its place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

from apertus_mlx.backend.metal.kernel import Kernel
from apertus_mlx.measure.doctor.device import Device, UnfitError
from apertus_mlx.measure.doctor.examine import examine_model

ROUNDS = 5
# A kernel, or compiling the step, has to save at least 2 % in every round; all kernels together
# just must not lose.
MOST_OF_A_KERNEL = 0.98
MOST_OF_A_MODEL = 1.0


@dataclass(frozen=True, slots=True)
class Race:
    """Times of one thing over those of another, one ratio a round; it ends with the first lost."""

    ratios: tuple[float, ...]
    # What each round's ratio may be at most.
    most: float
    reason: str | None = None

    @property
    def won(self) -> bool:
        """Whether it was fast enough in every round."""
        return (
            self.reason is None
            and len(self.ratios) == ROUNDS
            and all(ratio <= self.most for ratio in self.ratios)
        )

    @property
    def ratio(self) -> float:
        """The middle one; infinite if there is none."""
        return median(self.ratios) if self.ratios else float("inf")


def race(new: Callable[[], float], old: Callable[[], float], most: float) -> Race:
    """Time `old`, `new`, `new`, `old` in each round, so that a drift of the clock cancels out."""
    ratios: list[float] = []
    try:
        # Neither compiling nor the first touch of memory counts.
        old(), new()
        while len(ratios) < ROUNDS and (not ratios or ratios[-1] <= most):
            first, second, third, last = old(), new(), new(), old()
            ratios.append((second + third) / max(first + last, 1e-12))
    except UnfitError as error:
        return Race(tuple(ratios), most, str(error))
    return Race(tuple(ratios), most)


def tune(
    device: Device, kernels: Sequence[Kernel], on_stage: Callable[[str], None] = lambda _: None
) -> dict[str, Race]:
    """Key -> the race of each of `kernels` against its plain form; see `examine`."""
    races = {}
    for number, kernel in enumerate(kernels, 1):
        on_stage(f"timing {number}/{len(kernels)} {kernel.key}")
        races[kernel.key] = race(
            partial(device.seconds, kernel, fused=True),
            partial(device.seconds, kernel, fused=False),
            MOST_OF_A_KERNEL,
        )
    return races


def ranked(kernels: Sequence[Kernel], races: Mapping[str, Race]) -> dict[str, tuple[Kernel, ...]]:
    """Place -> those of `kernels` that won their race, the fastest first."""
    winners = sorted(
        (kernel for kernel in kernels if races[kernel.key].won),
        key=lambda kernel: races[kernel.key].ratio,
    )
    return {
        place: tuple(kernel for kernel in winners if kernel.place == place)
        for place in dict.fromkeys(kernel.place for kernel in winners)
    }


def tune_model(device: Device, kernels: Mapping[str, Kernel]) -> Race:
    """The race of the whole model with `kernels` against the plain one."""
    return race(
        lambda: device.step_seconds(kernels), lambda: device.step_seconds({}), MOST_OF_A_MODEL
    )


def tune_compilation(device: Device, kernels: Mapping[str, Kernel]) -> Race:
    """The race of the compiled step against the other, both with `kernels`; a wrong one loses."""
    _, wrong = examine_model(device, kernels, compiled=True)
    if wrong is not None:
        return Race((), MOST_OF_A_KERNEL, wrong)
    return race(
        lambda: device.step_seconds(kernels, compiled=True),
        lambda: device.step_seconds(kernels),
        MOST_OF_A_KERNEL,
    )
