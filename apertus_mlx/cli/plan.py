"""`apertus-mlx plan`: what a model takes and what fits, from its config and headers alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

from apertus_mlx.cli.options import JsonOption
from apertus_mlx.cli.output import Table, print_report
from apertus_mlx.cli.progress import show_progress
from apertus_mlx.errors import UsageError
from apertus_mlx.generation.options import CacheOptions
from apertus_mlx.system.arguments import Option
from apertus_mlx.system.sizes import counted, format_binary, format_bytes, format_parameters
from apertus_mlx.tools import plan as run
from apertus_mlx.tools import plan_overview, plan_pipeline

if TYPE_CHECKING:
    from apertus_mlx.memory.overview import Overview
    from apertus_mlx.memory.pipeline_report import PipelinePlan
    from apertus_mlx.memory.report import MemoryPlan


HEADER = ("cache", "KV/token", "weights", "KV", "prefill", "logits", "peak", "fits", "max ctx")
SPEED = "tok/s *"


def plan(
    given: Annotated[dict[str, Any], run],
    cache: CacheOptions,
    *,
    all: Annotated[bool, Option("Plan every released model instead, one line for each.")] = False,
    pipeline: Annotated[
        bool, Option("Split by layers; --device may name each machine, as 64GB,36GB.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Show what MODEL takes in memory, whether it fits a device, and the best settings there.

    A Hub id is planned from its headers; no weights are downloaded. `--device all` plans for every
    iPhone and iPad that runs MLX and every Mac with an M1 to M5, one line for each.

    KV/token: what a token adds to the cache, KV: the cache of the whole context. prefill, logits:
    working memory while the prompt is read, and while a token is drawn. peak: the most at once.

    max ctx: the longest context that fits. tok/s: tokens a second decoded, an estimate from the
    bytes that a token reads and the bandwidth of the device's memory.
    """
    from apertus_mlx.memory.devices import is_all

    with show_progress() as progress:
        options = {**given, **asdict(cache), "progress": progress}
        if pipeline:
            if all or options.pop("draft") is not None:
                raise UsageError("--pipeline: is planned for one model without a draft")
            split = plan_pipeline(**options)
            print_report(json, split.as_json, lambda: _stages(split))
            return
        if all or is_all(given["device"]):
            if options.pop("draft") is not None:
                raise UsageError("--draft: is planned for one model on one device")
            rows = plan_overview(**options, all_models=all)
            print_report(json, rows.as_json, lambda: _overview(rows))
            return
        report = run(**options)
    print_report(json, report.as_json, lambda: _words(report))


def _overview(report: Overview) -> Iterator[str | Table]:
    """One model on all devices, or all models on one."""
    first = report.rows[0]
    by_model = len({row.model for row in report.rows}) > 1
    if by_model:
        context = max(row.context for row in report.rows)
        yield (
            f"{first.device.name}: {format_bytes(first.device.memory_bytes)} for the process; "
            f"{counted(context, 'token')} of context, or the model's own"
        )
    else:
        yield (
            f"{first.model}: weights {format_bytes(first.weights_bytes)}; "
            f"{counted(first.context, 'token')} of context"
        )
    yield ""
    own = ["model", "weights"] if by_model else ["device", "RAM", "per process", "GB/s"]
    header = [*own, "peak", "fits", "cache", "prefill step", "max ctx", SPEED]
    rows = []
    for row in report.rows:
        speed = "-" if row.decode_tokens_per_s is None else f"{row.decode_tokens_per_s:.0f}"
        sign = "~" if row.is_estimate else ""
        place = row.device
        cells = [
            row.model,
            sign + format_bytes(row.weights_bytes),
        ] if by_model else [
            place.name,
            format_binary(place.ram_bytes or 0),
            format_bytes(place.memory_bytes),
            "-" if place.bandwidth is None else f"{place.bandwidth / 1e9:g}",
        ]  # fmt: skip
        settings = (row.form, str(row.prefill_step)) if row.fits else ("-", "-")
        rows.append([
            *cells, sign + format_bytes(row.total_bytes, round_up=True),
            "yes" if row.fits else "no", *settings, f"{row.largest_context:,}", speed,
        ])  # fmt: skip
    yield Table(header, rows)
    yield ""
    if any(row.is_estimate for row in report.rows):
        yield "~ computed from the model's shape, not read from its files"
    yield f"* {report.speed_formula}"


def _stages(report: PipelinePlan) -> Iterator[str | Table]:
    """One model on several machines."""
    yield (
        f"{report.model}: {counted(report.layers, 'layer')} on {len(report.stages)} machines, "
        f"{report.context} tokens of context; cache in {report.form}, "
        f"prefill step {report.prefill_step}"
    )
    yield ""
    header = ["rank", "device", "per process", "layers", "weights", "KV", "peak", "fits"]
    rows = []
    for rank, stage in enumerate(report.stages):
        rows.append([
            str(rank), stage.device, format_bytes(stage.limit_bytes),
            f"{stage.first_layer}-{stage.first_layer + stage.layers - 1}",
            format_bytes(stage.weights_bytes), format_bytes(stage.kv_bytes),
            format_bytes(stage.total_bytes, round_up=True), "yes" if stage.fits else "no",
        ])  # fmt: skip
    yield Table(header, rows)
    yield ""
    yield report.advice


def _words(report: MemoryPlan) -> Iterator[str | Table]:
    yield (
        f"{report.model}: {format_parameters(report.parameters)} parameters, "
        f"files {format_bytes(report.file_bytes)} ({report.file_bytes:,} bytes)"
    )
    yield (
        f"{report.device}: {format_bytes(report.limit_bytes)} for the process; "
        f"{report.context} tokens of context"
    )
    if report.draft_bytes:
        yield f"the draft takes {format_bytes(report.draft_bytes)} of that"
    if report.ranks > 1:
        yield f"split over {report.ranks} machines: weights, KV and all that follows are of one"
    yield ""
    header = list(HEADER)
    with_speed = any(row.decode_tokens_per_s is not None for row in report.forms)
    header += [SPEED] if with_speed else []
    rows = []
    for row in report.forms:
        cells = [
            f"{row.form}, prefill step {row.prefill_step}",
            format_bytes(row.kv_bytes_per_token),
            format_bytes(row.weights_bytes),
            format_bytes(row.kv_bytes),
            format_bytes(row.prefill_bytes),
            format_bytes(row.logits_bytes),
            format_bytes(row.total_bytes),
            "yes" if row.fits else "no",
            str(row.largest_context),
        ]
        rows.append([*cells, f"{row.decode_tokens_per_s:.0f}"] if with_speed else cells)
    yield Table(header, rows)
    yield ""
    yield report.advice
    if report.embedding_on_disk_saves_bytes:
        yield f"--embedding disk spares {format_bytes(report.embedding_on_disk_saves_bytes)}"
    if with_speed:
        yield f"* {report.speed_formula}"
