"""The typer application: which commands there are."""

from __future__ import annotations

from typing import Annotated

import typer

from apertus_mlx import __version__, sink
from apertus_mlx.cli.bench import bench
from apertus_mlx.cli.chat import chat
from apertus_mlx.cli.convert import convert
from apertus_mlx.cli.distill import distill
from apertus_mlx.cli.doctor import doctor
from apertus_mlx.cli.eval import evaluate
from apertus_mlx.cli.generate import generate
from apertus_mlx.cli.inspect import inspect
from apertus_mlx.cli.output import print_data
from apertus_mlx.cli.plan import plan
from apertus_mlx.cli.verify import verify

app = typer.Typer(
    add_completion=False,
    invoke_without_command=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (generate, chat, inspect, plan, convert, distill, verify, bench, doctor):
    app.command()(command)
app.command("eval")(evaluate)


def _show_version(wanted: bool) -> None:
    if wanted:
        print_data(__version__)
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    version: Annotated[  # noqa: ARG001 - its callback has acted
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Run and quantize the Apertus language models with MLX."""
    if context.invoked_subcommand is None:
        sink.put(context.get_help(), keep=sink.LAYOUT)
