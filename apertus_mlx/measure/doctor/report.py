"""What a doctor says in the end: the machine, each kernel, what is on, and what to do next."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from apertus_mlx.measure.doctor.consult import Consultation, KernelResult
from apertus_mlx.measure.doctor.device import Agreement
from apertus_mlx.measure.doctor.facts import Facts


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that `apertus-mlx doctor --json` prints."""

    machine: Facts
    # What MLX computes, by name -> error; see `facts.product_errors`.
    products: dict[str, float]
    products_right: bool
    model: str
    dtype: str
    kernels: tuple[KernelResult, ...]
    # Whether kernels were run, and whether there are times.
    examined: bool
    tuned: bool
    agreement: Agreement | None
    disagreement: str | None
    model_ratios: tuple[float, ...]
    compilation_ratios: tuple[float, ...]
    switched_off: bool
    conclusion: str
    # Where the verdict is stored; None if there is none.
    stored: str | None


def as_json(report: Report) -> dict[str, Any]:
    """`report` as an object; JSON has no infinities, they become null."""
    plain: dict[str, Any] = _finite(asdict(report))
    return plain


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def conclude(done: Consultation, command: str) -> str:
    """What is on, and what to do next; `command` is what started the examination."""
    right = len(done.right)
    if done.running:
        gain = ""
        if done.model_race is not None:
            gain = f"; a token takes {done.model_race.ratio:.2f} of the time of plain MLX"
        compilation = done.compilation_race
        if compilation is not None and compilation.won:
            gain += f", and with a compiled step {compilation.ratio:.2f} of that"
        elif compilation is not None and compilation.reason is not None:
            gain += f"; the step is not compiled: {compilation.reason}"
        places = len({kernel.place for kernel in done.kernels})
        return f"kernels are on in {len(done.running)} of {places} places{gain}"
    if done.disagreement is not None:
        return f"kernels stay off: {done.disagreement} when all are in the model"
    if not right:
        return "kernels stay off: none of them is right on this machine"
    if done.tuned:
        return "kernels stay off: plain MLX is as fast on this machine"
    return (
        f"kernels are off: {right} of {len(done.kernels)} are right, but none has been timed; "
        f"turn on those that are faster: {command} --tune"
    )
