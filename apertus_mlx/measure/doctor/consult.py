"""The whole examination in its order, and what is kept of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from apertus_mlx.backend.metal.kernel import Kernel
from apertus_mlx.backend.metal.verdict import Verdict
from apertus_mlx.measure.doctor.device import Agreement, Attempt, Device
from apertus_mlx.measure.doctor.examine import examine, examine_model, first_of_each_place
from apertus_mlx.measure.doctor.tune import Race, ranked, tune, tune_compilation, tune_model

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

    Args:
        device: what runs them.
        kernels: all that one model has places for.
        with_times: whether to turn on what is faster.
        previous: an older verdict on the same kernels. Without new times its order stays, less
            what is wrong by now.
        on_stage: is told what comes next.
    """
    done = Consultation(kernels, with_times or (previous is not None and previous.tuned))
    for finding in examine(device, kernels, on_stage):
        key = finding.kernel.key
        if finding.attempt is not None:
            done.attempts[key] = finding.attempt
        if finding.reason is not None:
            done.reasons[key] = finding.reason
    right = [kernel for kernel in kernels if kernel.key not in done.reasons]
    done.right = right
    if with_times:
        done.races = tune(device, right, on_stage)
        done.accepted = ranked(right, done.races)
        done.reasons |= {key: _lost(race) for key, race in done.races.items() if not race.won}
    elif previous is not None and previous.tuned:
        done.accepted = _still_right(right, previous)
        done.reasons = {**previous.rejected, **done.reasons}
    else:
        places = first_of_each_place(right)
        done.accepted = {
            place: tuple(kernel for kernel in right if kernel.place == place) for place in places
        }
    _examine_together(device, done, with_times, on_stage)
    return done


def _examine_together(
    device: Device, done: Consultation, with_times: bool, on_stage: Callable[[str], None]
) -> None:
    """Put all that are accepted into the model; drop some while it is wrong then, or slower."""
    while done.chosen:
        on_stage(f"running the whole model with {len(done.chosen)} of the kernels")
        done.agreement, done.disagreement = examine_model(device, done.chosen)
        if done.disagreement is not None:
            _drop_culprits(device, done)
            continue
        if not with_times:
            return
        on_stage("timing the whole model")
        done.model_race = tune_model(device, done.chosen)
        if done.model_race.won:
            on_stage("checking and timing the compiled step")
            done.compilation_race = tune_compilation(device, done.chosen)
            return
        # Singly they won: perhaps all but the one that gains the least do together.
        worst = max(done.chosen, key=lambda place: done.races[done.chosen[place].key].ratio)
        why = done.model_race.reason or f"{done.model_race.ratios[-1]:.2f} of the plain time"
        done.drop(worst, f"with the others in the model: {why}")


def _drop_culprits(device: Device, done: Consultation) -> None:
    """Turn off what is wrong in the model by itself; all, if that is nothing."""
    alone = {
        place: examine_model(device, {place: kernel})[1] for place, kernel in done.chosen.items()
    }
    culprits = {place: reason for place, reason in alone.items() if reason is not None}
    for place, reason in culprits.items():
        done.drop(place, f"in the model: {reason}")
    for place in () if culprits else tuple(done.accepted):
        done.drop(place, f"with the others in the model: {done.disagreement}")


def _still_right(right: Sequence[Kernel], previous: Verdict) -> dict[str, tuple[Kernel, ...]]:
    by_key = {kernel.key: kernel for kernel in right}
    kept = {
        place: tuple(by_key[key] for key in keys if key in by_key)
        for place, keys in previous.accepted.items()
    }
    return {place: kernels for place, kernels in kept.items() if kernels}


def _lost(race: Race) -> str:
    if race.reason is not None:
        return race.reason
    saved = f"{1 - race.most:.0%}"
    return f"not {saved} faster in every round: {max(race.ratios):.2f} of the plain time"


def keys_of(accepted: Mapping[str, Sequence[Kernel]]) -> dict[str, tuple[str, ...]]:
    """Kernels as a verdict names them."""
    return {place: tuple(kernel.key for kernel in kernels) for place, kernels in accepted.items()}
