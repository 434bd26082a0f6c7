"""The whole examination in its order, and what is kept of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from apertus_mlx.backend.metal.kernel import Kernel
from apertus_mlx.backend.metal.verdict import Verdict
from apertus_mlx.measure.doctor.device import Agreement, Attempt, Device, UnfitError
from apertus_mlx.measure.doctor.race import MOST_OF_A_KERNEL, MOST_OF_A_MODEL, Race, race

State = Literal["on", "spare", "right", "off", "unchecked"]


@dataclass(frozen=True, slots=True)
class KernelResult:
    """One kernel. `on`: it runs; `spare`: fast as well, another is faster; `right`: not timed."""

    place: str
    key: str
    state: State
    # Why it is off.
    reason: str | None
    tolerance: float
    attempt: Attempt | None = None
    # Its time over that of the plain form, one for each round.
    ratios: tuple[float, ...] = ()


@dataclass(slots=True)
class Consultation:
    """What was found out, step by step."""

    kernels: Sequence[Kernel]
    tuned: bool
    # Whether kernels could be run at all.
    examined: bool = True
    # Those that computed the right thing, each by itself.
    right: Sequence[Kernel] = ()
    attempts: dict[str, Attempt] = field(default_factory=dict)
    # Key -> why a kernel is off.
    reasons: dict[str, str] = field(default_factory=dict)
    races: dict[str, Race] = field(default_factory=dict)
    # Place -> those that may stand there, the best first.
    accepted: dict[str, tuple[Kernel, ...]] = field(default_factory=dict)
    # Of the model with the kernels that were last tried, and what is wrong with it.
    agreement: Agreement | None = None
    disagreement: str | None = None
    model_race: Race | None = None
    compilation_race: Race | None = None

    @property
    def chosen(self) -> dict[str, Kernel]:
        """Place -> the best kernel there."""
        return {place: kernels[0] for place, kernels in self.accepted.items()}

    @property
    def running(self) -> dict[str, Kernel]:
        """Place -> the kernel that is turned on."""
        return self.chosen if self.tuned else {}

    def results(self) -> tuple[KernelResult, ...]:
        """One for each kernel."""
        return tuple(
            KernelResult(
                kernel.place,
                kernel.key,
                self._state(kernel),
                self.reasons.get(kernel.key),
                kernel.tolerance,
                self.attempts.get(kernel.key),
                self.races[kernel.key].ratios if kernel.key in self.races else (),
            )
            for kernel in self.kernels
        )

    def _state(self, kernel: Kernel) -> State:
        if kernel.key in self.reasons:
            return "off"
        if not self.examined:
            return "unchecked"
        if self.running.get(kernel.place) == kernel:
            return "on"
        spare = self.tuned and kernel in self.accepted.get(kernel.place, ())
        return "spare" if spare else "right"

    def drop(self, place: str, reason: str) -> None:
        """Turn off all kernels of a place."""
        for kernel in self.accepted.pop(place):
            self.reasons[kernel.key] = reason


def consult(
    device: Device,
    kernels: Sequence[Kernel],
    with_times: bool,
    previous: Verdict | None = None,
    on_stage: Callable[[str], None] = lambda _: None,
) -> Consultation:
    """Examine `kernels`, and time them if so wished.

    One that fails in any way does not keep the others from their turn.

    Args:
        device: what runs them.
        kernels: all that one model has places for.
        with_times: whether to turn on what is faster.
        previous: an older verdict on the same kernels. Without new times its order stays, less
            what is wrong by now.
        on_stage: is told what comes next: should the whole machine hang, that was it.
    """
    known = previous if previous is not None and previous.tuned else None
    done = Consultation(kernels, with_times or known is not None)
    for number, kernel in enumerate(kernels, 1):
        on_stage(f"running {number}/{len(kernels)} {kernel.key}")
        try:
            attempt = done.attempts[kernel.key] = device.attempt(kernel)
            reason = attempt.fault(kernel.tolerance)
        except UnfitError as error:
            reason = str(error)
        if reason is not None:
            done.reasons[kernel.key] = reason
            on_stage(f"off: {reason}")
    done.right = right = [kernel for kernel in kernels if kernel.key not in done.reasons]
    if with_times:
        right = _faster(device, done, on_stage)
    elif known is not None:
        by_key = {kernel.key: kernel for kernel in right}
        order = [key for keys in known.accepted.values() for key in keys]
        right = [by_key[key] for key in order if key in by_key]
        done.reasons = {**known.rejected, **done.reasons}
    for kernel in right:
        done.accepted[kernel.place] = (*done.accepted.get(kernel.place, ()), kernel)
    _examine_together(device, done, with_times, on_stage)
    return done


def _faster(device: Device, done: Consultation, on_stage: Callable[[str], None]) -> list[Kernel]:
    """Those that won their race against the plain form, the fastest first."""
    for number, kernel in enumerate(done.right, 1):
        on_stage(f"timing {number}/{len(done.right)} {kernel.key}")
        done.races[kernel.key] = race(
            partial(device.seconds, kernel, fused=True),
            partial(device.seconds, kernel, fused=False),
            MOST_OF_A_KERNEL,
        )
    done.reasons |= {key: _lost(race) for key, race in done.races.items() if not race.won}
    winners = [kernel for kernel in done.right if done.races[kernel.key].won]
    return sorted(winners, key=lambda kernel: done.races[kernel.key].ratio)


def _examine_together(
    device: Device, done: Consultation, with_times: bool, on_stage: Callable[[str], None]
) -> None:
    """Put all that are accepted into the model; drop some while it is wrong then, or slower."""
    while chosen := done.chosen:
        on_stage(f"running the whole model with {len(chosen)} of the kernels")
        done.agreement, done.disagreement = _compare(device, chosen)
        if done.disagreement is not None:
            _drop_culprits(device, done)
            continue
        if not with_times:
            return
        on_stage("timing the whole model")
        step = partial(device.step_seconds, chosen)
        done.model_race = race(step, lambda: device.step_seconds({}), MOST_OF_A_MODEL)
        if done.model_race.won:
            on_stage("checking and timing the compiled step")
            _, wrong = _compare(device, chosen, compiled=True)
            done.compilation_race = (
                race(partial(step, compiled=True), step, MOST_OF_A_KERNEL)
                if wrong is None
                else Race((), MOST_OF_A_KERNEL, wrong)
            )
            return
        # Singly they won: perhaps all but the one that gains the least do together.
        worst = max(chosen, key=lambda place: done.races[chosen[place].key].ratio)
        why = done.model_race.reason or f"{done.model_race.ratios[-1]:.2f} of the plain time"
        done.drop(worst, f"with the others in the model: {why}")


def _compare(
    device: Device, kernels: Mapping[str, Kernel], compiled: bool = False
) -> tuple[Agreement | None, str | None]:
    """How the model with `kernels` follows the plain one, and what is wrong with it."""
    try:
        agreement = device.agreement(kernels, compiled)
    except UnfitError as error:
        return None, str(error)
    return agreement, agreement.fault()


def _drop_culprits(device: Device, done: Consultation) -> None:
    """Turn off what is wrong in the model by itself; all, if that is nothing."""
    alone = {place: _compare(device, {place: kernel})[1] for place, kernel in done.chosen.items()}
    culprits = {place: reason for place, reason in alone.items() if reason is not None}
    for place, reason in culprits.items():
        done.drop(place, f"in the model: {reason}")
    for place in () if culprits else tuple(done.accepted):
        done.drop(place, f"with the others in the model: {done.disagreement}")


def _lost(race: Race) -> str:
    if race.reason is not None:
        return race.reason
    saved = f"{1 - race.most:.0%}"
    return f"not {saved} faster in every round: {max(race.ratios):.2f} of the plain time"


def keys_of(accepted: Mapping[str, Sequence[Kernel]]) -> dict[str, tuple[str, ...]]:
    """Kernels as a verdict names them."""
    return {place: tuple(kernel.key for kernel in kernels) for place, kernels in accepted.items()}
