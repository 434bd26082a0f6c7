"""Text from standard input: whole, in UTF-8, and no longer than a model could read."""

from __future__ import annotations

import io
import sys

from apertus_mlx.cli import several
from apertus_mlx.cli.sink import note
from apertus_mlx.errors import UsageError
from apertus_mlx.system.sizes import format_binary

# Some 15 million tokens; what goes on is no prompt.
MAX_PROMPT_BYTES = 64 * 2**20


def read_prompt() -> str:
    """Standard input as text.

    Raises:
        UsageError: it is closed, not UTF-8, beyond `MAX_PROMPT_BYTES`, or that of `mlx.launch`,
            which never ends.
    """
    _require_stdin()
    if several.is_one_of_many():
        raise UsageError(
            "standard input does not end under mlx.launch; give the prompt as an argument, or "
            "--messages FILE"
        )
    if sys.stdin.isatty():
        note("reading the prompt from standard input; end it with Ctrl-D")
    data = sys.stdin.buffer.read(MAX_PROMPT_BYTES + 1)
    if len(data) > MAX_PROMPT_BYTES:
        raise UsageError(
            f"standard input: more than {format_binary(MAX_PROMPT_BYTES)}, which no model can "
            "read; shorten the prompt"
        )
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"standard input: byte {data[error.start]:#04x} at {error.start} is not UTF-8; convert "
            "the text, as with `iconv -f latin1 -t utf-8`"
        ) from None


def open_lines() -> None:
    """Make standard input give lines as UTF-8, where other bytes survive as surrogates.

    Raises:
        UsageError: it is closed.
    """
    _require_stdin()
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")


def _require_stdin() -> None:
    if sys.stdin is None:
        raise UsageError(
            "standard input is closed; give it something to read, or the prompt as an argument"
        )
