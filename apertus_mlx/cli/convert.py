"""`apertus-mlx convert`: a checkpoint becomes MLX weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from apertus_mlx.cli.options import JsonOption
from apertus_mlx.cli.output import Table, print_report
from apertus_mlx.cli.progress import show_progress
from apertus_mlx.errors import UsageError
from apertus_mlx.tools import convert_model


def convert(
    given: Annotated[dict[str, Any], convert_model],
    *,
    out_option: Annotated[Path | None, typer.Option("--out", help="The same as OUT.")] = None,
    json: JsonOption = False,
) -> None:
    """Convert SOURCE to MLX weights in the folder OUT, quantized where --bits is given."""
    from apertus_mlx.convert.report import inflation_rows, plan_rows

    if given["out"] is not None and out_option is not None:
        raise UsageError(
            f"--out {out_option}: the output folder is given twice, {given['out']} as well"
        )
    given["out"] = given["out"] or out_option
    with show_progress() as progress:
        done = convert_model(**given, progress=progress)
    if done.written:
        print_report(json, done.as_json, lambda: [str(done.output)])
    else:
        header, rows, lines = plan_rows(done.plan, done.disk_bytes, done.minutes)
        tables: list[Table | str] = [Table(header, rows), *lines]
        if done.cut is not None:
            tables += ["", Table(*inflation_rows(done.cut))]
        print_report(json, done.as_json, lambda: tables)
