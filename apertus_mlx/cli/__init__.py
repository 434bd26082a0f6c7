"""The command line: one file per command, one table of errors, one place that prints."""

from __future__ import annotations

import atexit
import os
import signal
import sys
from typing import Any


def main() -> None:
    """Entry point of `apertus-mlx`: run a command, turn failures into one line and an exit code."""
    try:
        # Nothing of ours is imported before, since an interrupt may come while it is.
        code = _run()
    except KeyboardInterrupt:
        code = 130
    from apertus_mlx.cli import several, sink

    several.leave(code)
    sink.finish()
    # During Python's own end an interrupt would print a traceback.
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_DFL)
    sys.exit(code)


def _run() -> int:
    """Run what the arguments say; returns the exit code."""
    from apertus_mlx.cli import sink
    from apertus_mlx.cli.surroundings import check_surroundings, open_streams
    from apertus_mlx.system import telemetry

    telemetry.turn_off()

    no_stdout = open_streams()
    sink.take_messages()
    try:
        check_surroundings(no_stdout)
        return _command()
    except SystemExit as ended:  # the sink's, where nobody reads any more
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except Exception as error:  # noqa: BLE001 - the one place where all of them end
        return _failed(error)


def _command() -> int:
    import typer

    from apertus_mlx.backend import command_buffers, tf32
    from apertus_mlx.cli.app import app
    from apertus_mlx.errors import UsageError

    # typer's own class for wrong arguments; which package it lives in changes with its version.
    wrong_usage: Any = typer.BadParameter.__mro__[1]
    command_buffers.widen()
    tf32.switch_off()
    try:
        # Outside its standalone mode typer returns the code of an Exit, an interrupt's among them.
        code = app(standalone_mode=False, prog_name="apertus-mlx")
    except typer.Abort:
        return 130
    except SystemExit as ended:
        # typer makes such an exit of every broken pipe; stdout's is the sink's.
        if ended.code and isinstance(ended.__context__, BrokenPipeError):
            raise ended.__context__ from None
        raise
    except wrong_usage as error:
        raise UsageError(_usage_message(error)) from None
    return code if isinstance(code, int) else 0


def _usage_message(error: Any) -> str:
    command = error.ctx.command_path if error.ctx else "apertus-mlx"
    # Of pydantic, which checks values for some versions of typer.
    message = error.format_message().replace("Value error, ", "").rstrip(".")
    return f"{message}; see `{command} --help`"


def _failed(error: Exception) -> int:
    """Say in one line what happened; returns the exit code."""
    from apertus_mlx.cli import several, sink
    from apertus_mlx.system.foreign_errors import explain

    if os.environ.get("APERTUS_MLX_DEBUG") == "1":
        import traceback

        sink.note("".join(traceback.format_exception(error)), end="", keep=sink.LAYOUT)
    error = several.explain_loss(error)
    known = explain(error)
    if known is None:
        message = (
            f"{type(error).__name__}: {error}. This is a bug; "
            "APERTUS_MLX_DEBUG=1 shows where, please report it"
        )
        code = 1
    else:
        message, code = str(known), known.exit_code
    prefix = several.leave(code)
    sink.note(f"{prefix}error: {' '.join(message.split())}")
    return code
