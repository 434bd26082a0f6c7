"""One visit to the doctor: the machine, the kernels of one model, and the verdict that is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime

from apertus_mlx.backend.metal.enabled import switched_off
from apertus_mlx.backend.metal.kernel import Kernel
from apertus_mlx.backend.metal.needed import kernels_for
from apertus_mlx.backend.metal.verdict import (
    Verdict,
    find_verdict,
    only_doctor,
    store_verdict,
    text_hash,
)
from apertus_mlx.backend.mlx import DTYPES
from apertus_mlx.checkpoint.inventory import Inventory
from apertus_mlx.measure.doctor.attended import AttendedDevice, child_command
from apertus_mlx.measure.doctor.consult import (
    Consultation,
    KernelResult,
    State,
    consult,
    keys_of,
)
from apertus_mlx.measure.doctor.facts import (
    PRODUCT_BOUND,
    Facts,
    gather_facts,
    product_errors,
)
from apertus_mlx.measure.doctor.report import Report, conclude
from apertus_mlx.measure.doctor.trace import trace


def visit(
    inventory: Inventory,
    name: str,
    dtype: str,
    with_times: bool,
    again: str = "apertus-mlx doctor",
    on_stage: Callable[[str], None] = lambda _: None,
) -> Report:
    """Examine this machine and the kernels of a model; keeps the verdict if there is Metal.

    Args:
        inventory: the model.
        name: what the report calls it.
        dtype: the type to compute in.
        with_times: whether to turn on the kernels that are faster.
        again: the command that does this once more, for advice.
        on_stage: is told what comes next.

    Raises:
        ResourceError: another doctor is at work, the verdict cannot be written, or memory lacks.
        RejectedError: no process can be started that tries the kernels.
    """
    facts, products = gather_facts(), product_errors()
    kernels = kernels_for(inventory.config, inventory.specs, DTYPES[dtype])
    done, stored = None, None
    results: Sequence[KernelResult] = ()
    if not kernels:
        conclusion = "this model has no place for a kernel"
    elif not facts.metal:
        results = [_traced(kernel) for kernel in kernels]
        conclusion = "no Metal: kernels stay off"
    else:
        done, stored = _examine(inventory, name, dtype, kernels, with_times, facts, on_stage)
        results, conclusion = done.results(), conclude(done, again)
    return Report(
        machine=facts,
        products=products,
        products_right=all(error <= PRODUCT_BOUND for error in products.values()),
        model=name,
        dtype=dtype,
        kernels=tuple(results),
        examined=done is not None,
        tuned=done is not None and done.tuned,
        agreement=done.agreement if done else None,
        disagreement=done.disagreement if done else None,
        model_ratios=done.model_race.ratios if done and done.model_race else (),
        compilation_ratios=done.compilation_race.ratios if done and done.compilation_race else (),
        switched_off=switched_off(),
        conclusion=conclusion,
        stored=stored,
    )


def _traced(kernel: Kernel) -> KernelResult:
    reason = trace(kernel)
    state: State = "unchecked" if reason is None else "off"
    return KernelResult(kernel.place, kernel.key, state, reason, kernel.tolerance)


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
    with only_doctor(), AttendedDevice(command) as device:
        previous = find_verdict(facts.identity, kernels)
        done = consult(device, kernels, with_times, previous, on_stage)
        path = store_verdict(
            Verdict(
                machine=facts.identity,
                texts=text_hash(kernels),
                model=name,
                date=datetime.now().astimezone().isoformat(timespec="seconds"),
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
