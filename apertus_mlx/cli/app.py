"""The typer application: which commands there are."""

from __future__ import annotations

from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from apertus_mlx import __version__
from apertus_mlx.cli import several, sink

# Each in the module of its name; `eval` is a word of Python.
COMMANDS = (
    *("generate", "chat", "serve", "models", "inspect", "plan", "convert", "distill", "verify"),
    *("bench", "doctor", "eval"),
)


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
    """All commands; one is imported when it is asked for, since most are not."""

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002 - the same in all contexts
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ARG002
        if cmd_name not in COMMANDS:
            return None
        from apertus_mlx.cli.options import spread

        module = import_module(f"apertus_mlx.cli.{cmd_name}")
        command = getattr(module, "evaluate" if cmd_name == "eval" else cmd_name)
        single = typer.Typer(add_completion=False, rich_markup_mode=None)
        single.command(cmd_name, cls=_Command)(spread(command))
        return typer.main.get_command(single)


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
    several.meet(context.invoked_subcommand)
    if context.invoked_subcommand is None:
        sink.put(context.get_help(), keep=sink.LAYOUT)
