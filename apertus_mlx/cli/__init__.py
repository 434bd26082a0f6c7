"""The command line: one file per command, one table of errors, one place that prints."""

from __future__ import annotations

import os
import sys
from typing import Any, NoReturn


def main() -> None:
    """Entry point of `apertus-mlx`: run a command, turn failures into one line and an exit code."""
    import typer

    from apertus_mlx import command_buffers
    from apertus_mlx.cli.app import app
    from apertus_mlx.errors import ApertusError

    # typer's own class for wrong arguments; which package it lives in changes with its version.
    wrong_usage = typer.BadParameter.__mro__[1]
    debug = os.environ.get("APERTUS_MLX_DEBUG") == "1"
    command_buffers.widen()
    try:
        # Outside its standalone mode typer returns the code of an Exit, an interrupt's among them.
        sys.exit(app(standalone_mode=False, prog_name="apertus-mlx"))
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(130)
    except ApertusError as error:
        if debug:
            raise
        _fail(str(error), error.exit_code)
    except Exception as error:
        if isinstance(error, wrong_usage):
            _fail(_usage_message(error), 2)
        if debug:
            raise
        _fail(
            f"{type(error).__name__}: {error}. This is a bug; "
            "APERTUS_MLX_DEBUG=1 shows where, please report it",
            1,
        )


def _usage_message(error: Any) -> str:
    command = error.ctx.command_path if error.ctx else "apertus-mlx"
    return f"{error.format_message().rstrip('.')}; see `{command} --help`"


def _fail(message: str, exit_code: int) -> NoReturn:
    line = " ".join(message.split())
    print(f"error: {line}", file=sys.stderr)
    sys.exit(exit_code)
