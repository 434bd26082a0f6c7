"""One visit to the doctor: the machine, the kernels of one model, and the verdict that is kept."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import mlx.core as mx

from apertus_mlx.backend.metal import verdict
from apertus_mlx.backend.metal.enabled import switched_off
from apertus_mlx.backend.metal.kernel import Kernel, build
from apertus_mlx.backend.metal.needed import kernels_for
from apertus_mlx.backend.metal.verdict import Verdict
from apertus_mlx.backend.mlx import DTYPES
from apertus_mlx.backend.row_costs import RowCosts, products_of, store_row_costs
from apertus_mlx.checkpoint.inventory import Inventory
from apertus_mlx.measure.doctor.attended import AttendedDevice, child_command
from apertus_mlx.measure.doctor.consult import Consultation, KernelResult, consult, keys_of
from apertus_mlx.measure.doctor.device import Agreement
from apertus_mlx.measure.doctor.facts import PRODUCT_BOUND, Facts, gather_facts, product_errors
from apertus_mlx.measure.doctor.row_costs import row_costs


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
    # What products with 1 to 5 rows cost, beside those with one; only with times.
    row_costs: tuple[float, ...]
    # Where drafts find them; None if there are none.
    row_costs_stored: str | None
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


def visit(
    inventory: Inventory,
    name: str,
    dtype: str,
    with_times: bool,
    again: str = "apertus-mlx doctor",
    on_stage: Callable[[str], None] = lambda _: None,
) -> Report:
    """Examine this machine and the kernels of a model; keeps the verdict if there is Metal.

    With times, what several rows cost is kept on any machine.

    Args:
        inventory: the model.
        name: what the report calls it.
        dtype: the type to compute in.
        with_times: whether to turn on the kernels that are faster.
        again: the command that does this once more, for advice.
        on_stage: is told what comes next.

    Raises:
        ResourceError: another doctor is at work, what is kept cannot be written, or memory lacks.
        RejectedError: no process can be started that tries the kernels.
    """
    facts, products = gather_facts(), product_errors()
    kernels = kernels_for(inventory.config, inventory.specs, DTYPES[dtype])
    done, stored = Consultation(kernels, tuned=False, examined=False), None
    if not kernels:
        conclusion = "this model has no place for a kernel"
    elif not facts.metal:
        traced = {kernel.key: trace(kernel) for kernel in kernels}
        done.reasons = {key: reason for key, reason in traced.items() if reason is not None}
        conclusion = "no Metal: kernels stay off"
    else:
        done, stored = _examine(inventory, name, dtype, kernels, with_times, facts, on_stage)
        conclusion = conclude(done, again)
    costs = row_costs(inventory, DTYPES[dtype]) if with_times else ()
    return Report(
        machine=facts,
        products=products,
        products_right=all(error <= PRODUCT_BOUND for error in products.values()),
        model=name,
        dtype=dtype,
        kernels=done.results(),
        examined=done.examined,
        tuned=done.tuned,
        agreement=done.agreement,
        disagreement=done.disagreement,
        model_ratios=done.model_race.ratios if done.model_race else (),
        compilation_ratios=done.compilation_race.ratios if done.compilation_race else (),
        row_costs=costs,
        row_costs_stored=_kept(costs, inventory, name, dtype, facts) if costs else None,
        switched_off=switched_off(),
        conclusion=conclusion,
        stored=stored,
    )


def _kept(
    costs: tuple[float, ...], inventory: Inventory, name: str, dtype: str, facts: Facts
) -> str:
    products = products_of(inventory, dtype)
    with verdict.only_doctor():
        return str(store_row_costs(RowCosts(facts.identity, products, name, _now(), costs)))


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


def trace(kernel: Kernel) -> str | None:
    """Without Metal: put `kernel` into a graph as MLX would call it; the reason if that fails."""
    try:
        run = build(kernel)
        inputs = kernel.trial(0)
        with tempfile.TemporaryDirectory() as folder:  # noqa: TID251 - some kB, for a moment
            path = Path(folder) / "kernel.mlxfn"
            mx.export_function(str(path), lambda *arrays: run(arrays), *inputs)
            held = kernel.text().source.strip().encode() in path.read_bytes()
    except Exception as error:  # noqa: BLE001 - whatever it is, the kernel is off
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return None if held else "MLX does not keep its text"


def _examine(
    inventory: Inventory,
    name: str,
    dtype: str,
    kernels: Sequence[Kernel],
    with_times: bool,
    facts: Facts,
    on_stage: Callable[[str], None],
) -> tuple[Consultation, str]:
    """Run the kernels in another process, and store the verdict."""
    command = child_command(inventory.checkpoint.directory, dtype)
    with verdict.only_doctor(), AttendedDevice(command) as device:
        previous = verdict.find_verdict(facts.identity, kernels)
        done = consult(device, kernels, with_times, previous, on_stage)
        path = verdict.store_verdict(
            Verdict(
                machine=facts.identity,
                texts=verdict.text_hash(kernels),
                model=name,
                date=_now(),
                tuned=done.tuned,
                accepted=keys_of(done.accepted),
                rejected=done.reasons,
                compiled_step=_compiled_step(done, previous),
            )
        )
    return done, str(path)


def _compiled_step(done: Consultation, previous: Verdict | None) -> bool | None:
    if done.compilation_race is not None:
        return done.compilation_race.won
    return previous.compiled_step if previous is not None and not done.races else None


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
