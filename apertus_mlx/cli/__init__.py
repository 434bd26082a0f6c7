"""The command line: one file per command, one table of errors, one place that prints."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Entry point of `apertus-mlx`: run a command, turn failures into one line and an exit code."""
    import click

    from apertus_mlx.cli.app import app
    from apertus_mlx.errors import ApertusError

    debug = os.environ.get("APERTUS_MLX_DEBUG") == "1"
    try:
        app(standalone_mode=False, prog_name="apertus-mlx")
        sys.stdout.flush()
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "apertus-mlx"
        _fail(f"{error.format_message()}; see `{command} --help`", 2)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
    except BrokenPipeError:
        # The reader has gone (`| head`); keep the interpreter from complaining while it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except ApertusError as error:
        if debug:
            raise
        _fail(str(error), error.exit_code)
    except Exception as error:
        if debug:
            raise
        _fail(
            f"{type(error).__name__}: {error}. This is a bug; "
            "APERTUS_MLX_DEBUG=1 shows where, please report it",
            1,
        )


def _fail(message: str, exit_code: int) -> None:
    line = " ".join(message.split())
    print(f"error: {line}", file=sys.stderr)
    sys.exit(exit_code)
