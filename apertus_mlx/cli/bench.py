"""`apertus-mlx bench`: speed and memory of a model on this machine, alone or beside mlx-lm."""

from __future__ import annotations

import sys
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from apertus_mlx.cli import options
from apertus_mlx.cli.output import Table, print_report
from apertus_mlx.cli.progress import token_progress
from apertus_mlx.cli.sink import note
from apertus_mlx.generation.options import LOOKUP, NO_DRAFT, DraftOptions, RunOptions
from apertus_mlx.system.arguments import Option, Range
from apertus_mlx.system.sizes import counted, format_binary, format_bytes, format_parameters

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from apertus_mlx.cache import CacheConfig
    from apertus_mlx.checkpoint.inventory import Inventory
    from apertus_mlx.measure.bench.report import Report, SideReport
    from apertus_mlx.measure.bench.sides import Settings
    from apertus_mlx.measure.bench.workload import Workload

MAX_COUNT = 2**20
OURS = "apertus_mlx.measure.bench.ours"
SIDES = (("apertus-mlx", OURS), ("mlx-lm", "apertus_mlx.measure.bench.peer"))
DRAFTED = (("with the draft", OURS), ("plain", OURS))


def bench(
    model: options.ModelArgument = None,
    *,
    prompt_tokens: Annotated[
        str | None, Option("Lengths of prompts to read; default: 128,512,2048; '' for none.")
    ] = None,
    depths: Annotated[
        str | None, Option("Tokens that stand before; default: 0,1024,4096; '' for none.")
    ] = None,
    new_tokens: Annotated[int, Option("Tokens decoded at a depth.", Range(1, MAX_COUNT))] = 64,
    rounds: Annotated[int, Option("How often all is measured.", Range(1, MAX_COUNT))] = 5,
    against: Annotated[
        Literal["mlx-lm"] | None,
        Option("Measure mlx-lm as well, turn by turn, in a process of its own."),
    ] = None,
    seed: Annotated[int, Option("Same seed, same random prompts.", Range(0, 2**32))] = 0,
    plot: options.PlotOption = None,
    settings: RunOptions,
    draft: DraftOptions = NO_DRAFT,
    json: options.JsonOption = False,
) -> None:
    """Measure how fast MODEL reads and writes here, and what it takes in memory.

    Tokens are random, drawing them and reading them back is included, a first go does not count.
    ± is half of what lies between the slowest and the fastest turn.

    With --draft, with it and without, turn by turn. How often it is right behind random tokens says
    little about your texts.

    KV read: keys and values that a decoded token reads. roofline: the share of the speed at which
    the memory could deliver them and the weights.
    """
    from apertus_mlx.backend.hardware import has_library
    from apertus_mlx.backend.ranks import joined
    from apertus_mlx.cache import FULL_PRECISION
    from apertus_mlx.cache.config import FULL_BITS
    from apertus_mlx.checkpoint.inventory import take_inventory
    from apertus_mlx.cli.model_source import locate_model, open_draft, plan_run
    from apertus_mlx.cli.plot import check_plot
    from apertus_mlx.errors import RejectedError, UsageError
    from apertus_mlx.generation.agreement import require_same_model
    from apertus_mlx.generation.memory_plan import memory_limit
    from apertus_mlx.generation.model_folder import open_folder
    from apertus_mlx.generation.own_part import own_part
    from apertus_mlx.measure.bench.sides import Settings
    from apertus_mlx.measure.bench.workload import make_workload
    from apertus_mlx.system.model_files import check_folder

    if plot is not None:
        check_plot(plot)
        if depths is not None and not depths.strip():
            raise UsageError("--plot: draws speed against depth, of which --depths has none")
    if against is not None and draft.draft is not None:
        raise UsageError("--against and --draft: give one of them")
    if against is not None and not has_library("mlx_lm"):
        raise UsageError("--against mlx-lm: install it: pip install mlx-lm")
    if settings.form is None:  # the planner must not change what is compared
        settings = replace(settings, kv_bits=FULL_BITS)
    directory = locate_model(model, settings.revision, settings.offline)
    inventory = take_inventory(directory)
    if against is not None and "model_file" in inventory.config.asks_for_code:
        raise RejectedError(f"{directory}: config.json: model_file names code, which mlx-lm runs")
    if against is not None:
        check_folder(directory)  # mlx-lm follows links and opens whatever has the right name
    if (ranks := joined()) is not None:
        if against is not None or draft.draft is not None:
            raise UsageError(
                "--against and --draft: measure on one machine; under mlx.launch leave them out"
            )
        require_same_model(ranks, inventory)
    part = own_part(inventory, settings)
    workload = make_workload(
        prompt_tokens,
        depths,
        new_tokens,
        rounds,
        seed,
        inventory.config.max_position_embeddings,
    )
    sides = SIDES[:1] if against is None else SIDES
    helper = None
    if draft.draft is not None:
        sides, helper = DRAFTED, open_draft(open_folder(directory), draft, settings)
    if len(sides) > 1:
        # Both models are in memory at once, so each side gets its share of it.
        settings = replace(settings, memory_limit=memory_limit(settings) // len(sides))
    fit = plan_run(part, settings, workload.context, helper)
    side_settings = Settings(
        directory=str(directory),
        vocab_size=inventory.config.vocab_size,
        new_tokens=workload.new_tokens,
        seed=workload.seed,
        dtype=settings.dtype,
        compute=settings.compute,
        precision=settings.precision,
        form=asdict(fit.form),
        prefill_step=fit.prefill_step,
        buffer_cache_bytes=fit.buffer_cache_bytes,
        wired_bytes=fit.wired_bytes,
    )
    started = [(*side, side_settings) for side in sides]
    if draft.draft is not None:
        place = LOOKUP if helper is None else str(helper.directory)
        drafted = replace(side_settings, draft=place, draft_vocab=draft.draft_vocab)
        started[0] = (*sides[0], drafted)
    forms = [fit.form if module == OURS else FULL_PRECISION for _, module in sides]
    report = _measure(inventory, part, model or "embedded", workload, forms, started)
    print_report(json, lambda: asdict(report), lambda: _words(report))
    if plot is not None:
        _draw(report, plot)


def _measure(
    inventory: Inventory,
    part: Inventory,
    name: str,
    workload: Workload,
    forms: Sequence[CacheConfig],
    started_as: Sequence[tuple[str, str, Settings]],
) -> Report:
    """Start the sides, let them take turns, and put together what they found.

    Of several ranks each measures its `part` in its own process, all at the same time.
    """
    from apertus_mlx.measure.bench.ours import Here
    from apertus_mlx.measure.bench.report import SideReport, make_report, measurements
    from apertus_mlx.measure.bench.roofline import find_bandwidth
    from apertus_mlx.measure.bench.sides import Side
    from apertus_mlx.measure.bench.turns import time_task, total_tokens
    from apertus_mlx.measure.doctor.facts import gather_facts

    started = datetime.now().astimezone()
    alone = part.part is None
    for file in inventory.checkpoint.files if alone else ():
        _read_ahead(inventory.checkpoint.directory / file)
    with ExitStack() as stack:
        sides: list[Side | Here] = []
        if not alone:
            note("loading")
            sides.append(stack.enter_context(closing(Here(started_as[0][2], part))))
        for side_name, module, settings in started_as if alone else ():
            note(f"{side_name}: loading")
            # -P: a module in the current folder must not take the place of one of ours.
            command = [sys.executable, "-P", "-m", module]
            sides.append(stack.enter_context(closing(Side(side_name, command, settings))))
        taken = {}
        for task in workload.tasks:
            note(f"{task}: {counted(workload.rounds, 'round')}")
            with token_progress(str(task), total_tokens(len(sides), task, workload)) as update:
                taken[task] = time_task(sides, task, workload, update)
    # Only now: on Linux a process's peak begins with that of the one that started it.
    machine = gather_facts()
    bandwidth = find_bandwidth(machine.identity.chip, machine.memory_bytes)
    reports = []
    for index, side in enumerate(sides):
        own = {task: rounds[index] for task, rounds in taken.items()}
        # Nobody knows the links between machines.
        known = bandwidth if alone else None
        found = measurements(inventory, known, workload, side.ready, forms[index], own)
        reports.append(
            SideReport(
                side.name, side.ready, side.start_s, side.peak_memory_bytes, found,
                side.speculation,
            )
        )  # fmt: skip
    return make_report(inventory, name, machine, bandwidth, workload, reports, started)


def _read_ahead(path: Path) -> None:
    """Have the system hold a file, so that no side loads it sooner than another."""
    from apertus_mlx.system.model_files import open_file

    with open_file(path) as file:
        while file.read(2**24):
            pass


def _draw(report: Report, path: Path) -> None:
    from apertus_mlx.cli.plot import Series, save_plot

    def series(side: SideReport) -> Series:
        found = [one for one in side.measurements if one.task.kind == "decode"]
        return Series(
            f"{side.name} {side.ready.version}",
            [one.task.tokens for one in found],
            [one.tokens_per_s.median for one in found],
            [one.tokens_per_s.spread for one in found],
        )

    ours = report.sides[0].measurements
    known = [(one.task.tokens, one.roofline_tokens_per_s) for one in ours]
    roofline = [(depth, rate) for depth, rate in known if rate is not None]
    lines = [series(side) for side in report.sides]
    lines.append(
        Series("roofline", [d for d, _ in roofline], [r for _, r in roofline], is_limit=True)
    )
    title = f"{Path(report.model.name).name} on {report.machine.identity.chip}, {report.date[:10]}"
    save_plot(path, lines, "depth, tokens", "decoded tokens/s", title, from_zero=True)


def _words(report: Report) -> Iterator[str | Table]:
    machine, model, bandwidth = report.machine, report.model, report.bandwidth_bytes_per_s
    yield (
        f"{model.name}: {format_parameters(model.parameters)} parameters, "
        f"{model.bits_per_weight:.2f} bits per weight; "
        f"a token reads {format_bytes(model.weights_read_bytes)} of weights"
    )
    yield f"{machine.identity}; {format_binary(machine.memory_bytes)}; {report.date}"
    stated = f"{format_bytes(bandwidth.published)}/s published, " if bandwidth.published else ""
    yield f"bandwidth: {stated}{format_bytes(bandwidth.measured)}/s measured"
    for side in report.sides:
        ready = side.ready
        kernels = f", kernels {' + '.join(ready.kernels)}" if ready.kernels else ""
        yield (
            f"{side.name} {ready.version}: {ready.backend}{kernels}, {ready.dtype}, cache in "
            f"{ready.cache}; loads in {ready.load_s:.2f} s, ready {side.start_s:.2f} s after its "
            f"start; peak memory {format_bytes(side.peak_memory_bytes)}"
        )
        if (draft := side.speculation) is not None:
            off = f"; off: {draft['off']}" if draft["off"] else ""
            yield (
                f"the draft: {draft['accepted']} of {draft['drafted']} guesses right, "
                f"{draft['tokens_per_pass']:.2f} tokens a pass{off}"
            )
    yield from report.notes
    yield ""
    yield _table(report)


def _table(report: Report) -> Table:
    """A row for each task, columns for each side."""
    header = ["tokens/s"]
    for side in report.sides:
        header += [side.name, "KV read", "roofline"]
    rows = []
    for index, task in enumerate(report.workload.tasks):
        row = [str(task)]
        for side in report.sides:
            found = side.measurements[index]
            row += [str(found.tokens_per_s), "-", "-"]
            if found.kv_read_bytes is not None:
                share = found.roofline_share
                row[-2:] = [
                    format_bytes(found.kv_read_bytes),
                    "-" if share is None else f"{share:.0%}",
                ]
        row += [str(report.ratios[index].ratio)] if report.ratios else []
        rows.append(row)
    header += [f"x {side.name}" for side in report.sides[1:]]
    return Table(header, rows)
