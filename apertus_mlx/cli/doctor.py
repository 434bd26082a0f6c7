"""`apertus-mlx doctor`: what this machine is, and which kernels it can be trusted with."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from apertus_mlx.cli import options
from apertus_mlx.cli.output import Table, print_report
from apertus_mlx.cli.sink import note
from apertus_mlx.generation.options import DType, Offline, Revision
from apertus_mlx.system.arguments import Option
from apertus_mlx.system.sizes import counted, format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from apertus_mlx.checkpoint.inventory import Inventory
    from apertus_mlx.measure.doctor.consult import KernelResult
    from apertus_mlx.measure.doctor.facts import Facts
    from apertus_mlx.measure.doctor.visit import Report


def doctor(
    model: options.ModelArgument = None,
    *,
    tune: Annotated[
        bool, Option("Time the kernels too, and turn on those that are faster.")
    ] = False,
    reset: Annotated[bool, Option("Forget what was found out; all kernels are off then.")] = False,
    dtype: Annotated[DType | None, Option("Type to compute in; default: what suits.")] = None,
    revision: Revision = None,
    offline: Offline = False,
    json: options.JsonOption = False,
) -> None:
    """Show what this machine is, and prove the Metal kernels that MODEL can use.

    Kernels are off until `--tune` has found them right and faster here. What is found out is kept
    for this chip, macOS and MLX. APERTUS_MLX_KERNELS=0 turns all of them off.
    """
    from apertus_mlx.errors import RejectedError, UsageError

    if reset:
        if tune or model is not None:
            raise UsageError("--reset forgets everything; use it alone")
        _reset(json)
        return

    from apertus_mlx.backend import tf32
    from apertus_mlx.backend.hardware import has_metal
    from apertus_mlx.backend.metal.text import type_key
    from apertus_mlx.backend.mlx import compute_dtype
    from apertus_mlx.checkpoint.inventory import take_inventory
    from apertus_mlx.cli.model_source import locate_model
    from apertus_mlx.measure.doctor.visit import as_json, visit

    directory = locate_model(model, revision, offline)
    inventory = take_inventory(directory)
    name = (
        "embedded" if model is None else directory.resolve().name if Path(model).is_dir() else model
    )
    dtype_name = dtype or type_key(compute_dtype(inventory))
    if has_metal():
        _require_memory(inventory, dtype_name)
    chosen = [*([model] if model else []), *(["--dtype", dtype_name] if dtype else [])]
    again = shlex.join(["apertus-mlx", "doctor", *chosen])
    report = visit(inventory, name, dtype_name, tune, again, on_stage=note)
    print_report(json, lambda: as_json(report), lambda: _words(report))
    if not report.products_right:
        way_out = "reinstall it (pip install --force-reinstall mlx)"
        if tf32.asked_for():
            way_out = f"{tf32.VARIABLE} rounds float32 to 10 bits; unset it"
        raise RejectedError(f"MLX computes wrongly on this machine: {way_out}")


def _reset(json: bool) -> None:
    from apertus_mlx.backend.metal.verdict import forget_verdicts, only_doctor
    from apertus_mlx.backend.row_costs import forget_row_costs

    with only_doctor():
        path = forget_verdicts()
        forget_row_costs()
    print_report(
        json, lambda: {"forgotten": str(path)}, lambda: [f"{path}: forgotten; kernels are off"]
    )


def _require_memory(inventory: Inventory, dtype: str) -> None:
    """Refuse a model that does not fit before anything is loaded."""
    from apertus_mlx.cache.config import FULL_BITS
    from apertus_mlx.generation.memory_plan import plan_memory
    from apertus_mlx.generation.options import RunOptions
    from apertus_mlx.measure.doctor.mlx_device import CONTEXT

    # `dtype` is one of MLX's names.
    settings = RunOptions(kv_bits=FULL_BITS, dtype=dtype, compute="mlx")  # type: ignore[arg-type]
    plan_memory(inventory, settings, CONTEXT)


def _words(report: Report) -> Iterator[str | Table]:
    from apertus_mlx.measure.doctor.facts import PRODUCT_BOUND

    yield from _machine_lines(report.machine)
    for product, error in report.products.items():
        mark = "right" if error <= PRODUCT_BOUND else "WRONG"
        yield f"{product}: {mark}, error {error:.1e}, at most {PRODUCT_BOUND:.0e}"
    yield ""
    if report.kernels:
        places = _one_of_each_place(report.kernels)
        yield (
            f"{report.model} in {report.dtype} has {len(places)} places for kernels, and "
            f"{counted(len(report.kernels), 'kernel')} for them:"
        )
        shown = report.kernels if report.examined else places
        header = ["kernel", "result", "error", "bound", "time/plain"]
        yield Table(header, [_row(result) for result in shown])
        for result in report.kernels:
            if result.reason is not None:
                yield f"{result.key}: {result.reason}"
        yield ""
    if report.agreement is not None:
        found = report.agreement
        yield (
            f"whole model: {found.same} of {found.tokens} greedy tokens the same, logits differ by "
            f"{found.error:.1e}, at most {found.bound:.0e}"
        )
    if report.kernels and not report.examined:
        yield (
            "not checked: whether the kernels compile, what they compute, how fast they are; that "
            "takes a Mac. Checked: that their texts can be made, and MLX takes them."
        )
    if report.row_costs:
        shares = ", ".join(f"{cost:.2f}" for cost in report.row_costs[1:])
        yield (
            f"2 to {len(report.row_costs)} rows at once take {shares} times what one takes: the "
            "closer to 1, the more a draft can gain"
        )
        yield f"drafts begin with that; stored in {report.row_costs_stored}"
    if report.stored is not None:
        yield f"stored in {report.stored}"
    if report.switched_off:
        yield "APERTUS_MLX_KERNELS=0 is set: whatever follows, none runs"
    yield report.conclusion


def _machine_lines(facts: Facts) -> list[str]:
    identity = facts.identity
    memory = f"memory {format_bytes(facts.memory_bytes)}"
    memory += f", {format_bytes(facts.available_bytes)} for a run"
    if facts.recommended_working_set_bytes is not None:
        memory += f"; Metal recommends up to {format_bytes(facts.recommended_working_set_bytes)}"
    if facts.largest_buffer_bytes is not None:
        memory += f", {format_bytes(facts.largest_buffer_bytes)} in one buffer"
    gpu = "Metal" if facts.metal else "a GPU without Metal" if facts.gpu else "no GPU"
    if facts.gpu and facts.mlx_library == "cuda":
        gpu = "CUDA"
    wheels = ", ".join(f"{name} {number}" for name, number in facts.mlx_wheels.items())
    lines = [
        f"{identity.chip} ({facts.architecture}), {identity.system}, {gpu}",
        memory,
        f"apertus-mlx {identity.package}, MLX {identity.mlx}, Python {facts.python}",
        f"MLX's library: {facts.mlx_library} (of {wheels or 'no package that is known'})",
        ", ".join(f"{name} {number or '-'}" for name, number in facts.packages.items()),
    ]
    if len(facts.mlx_wheels) > 1:
        lines.append("these packages overwrite each other's library: keep one (docs/cuda.md)")
    if facts.mlx_variables:
        lines.append(" ".join(f"{name}={value}" for name, value in facts.mlx_variables.items()))
    return lines


def _one_of_each_place(results: Sequence[KernelResult]) -> list[KernelResult]:
    """Variants that differ in their constants alone have nothing to tell before they are run."""
    found: dict[str, KernelResult] = {}
    for result in results:
        found.setdefault(result.place, result)
    return list(found.values())


def _row(result: KernelResult) -> list[str]:
    error = "-" if result.attempt is None else f"{result.attempt.error:.1e}"
    ratios = sorted(result.ratios)
    time = f"{ratios[len(ratios) // 2]:.2f}" if ratios else "-"
    return [result.key, result.state, error, f"{result.tolerance:.1e}", time]
