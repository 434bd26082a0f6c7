"""The typer application: which commands there are."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from apertus_mlx import __version__
from apertus_mlx.cli import sink
from apertus_mlx.cli.bench import bench
from apertus_mlx.cli.chat import chat
from apertus_mlx.cli.convert import convert
from apertus_mlx.cli.distill import distill
from apertus_mlx.cli.doctor import doctor
from apertus_mlx.cli.eval import evaluate
from apertus_mlx.cli.generate import generate
from apertus_mlx.cli.inspect import inspect
from apertus_mlx.cli.models import models
from apertus_mlx.cli.options import spread
from apertus_mlx.cli.plan import plan
from apertus_mlx.cli.verify import verify


class _HelpThroughSink:
    """Commands whose `--help` is printed as all else is."""

    def get_help_option(self, context: Any) -> Any:
        option = super().get_help_option(context)  # type: ignore[misc]
        if option is not None:
            option.callback = _show_help
        return option


class _Command(_HelpThroughSink, TyperCommand):
    pass


class _Group(_HelpThroughSink, TyperGroup):
    pass


def _show_help(context: Any, _: Any, wanted: bool) -> None:
    if wanted and not context.resilient_parsing:
        sink.put(context.get_help(), keep=sink.LAYOUT)
        raise typer.Exit


app = typer.Typer(
    cls=_Group,
    add_completion=False,
    invoke_without_command=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (generate, chat, models, inspect, plan, convert, distill, verify, bench, doctor):
    app.command(cls=_Command)(spread(command))
app.command("eval", cls=_Command)(spread(evaluate))


def _show_version(wanted: bool) -> None:
    if wanted:
        sink.put(__version__)
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
    context.with_resource(sink.log_shown())
    if context.invoked_subcommand is None:
        sink.put(context.get_help(), keep=sink.LAYOUT)
