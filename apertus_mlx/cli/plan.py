"""`apertus-mlx plan`: what a model takes and what fits, from its config and headers alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

from apertus_mlx.cli.options import JsonOption
from apertus_mlx.cli.output import Table, print_report
from apertus_mlx.cli.progress import show_progress
from apertus_mlx.generation.options import CacheOptions
from apertus_mlx.system.sizes import format_bytes
from apertus_mlx.tools import plan as run

if TYPE_CHECKING:
    from apertus_mlx.memory.report import MemoryPlan


def plan(
    given: Annotated[dict[str, Any], run], cache: CacheOptions, *, json: JsonOption = False
) -> None:
    """Show what MODEL takes in memory, whether it fits a device, and the best settings there.

    A Hub id is planned from its headers; no weights are downloaded.
    """
    with show_progress() as progress:
        report = run(**given, **asdict(cache), progress=progress)
    print_report(json, report.as_json, lambda: _words(report))


def _words(report: MemoryPlan) -> Iterator[str | Table]:
    yield (
        f"{report.model}: {report.parameters / 1e6:.0f} M parameters, "
        f"files {format_bytes(report.file_bytes)} ({report.file_bytes:,} bytes)"
    )
    yield (
        f"{report.device}: {format_bytes(report.limit_bytes)} for the process; "
        f"{report.context} tokens of context"
    )
    yield ""
    header = ["cache", "KV/token", "weights", "KV", "prefill", "logits", "peak", "fits", "max ctx"]
    with_speed = any(row.decode_tokens_per_s is not None for row in report.forms)
    header += ["tok/s *"] if with_speed else []
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
    if with_speed:
        yield f"* {report.speed_formula}"
