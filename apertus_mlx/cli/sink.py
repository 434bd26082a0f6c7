r"""The one place that prints, with nothing in what it prints that a terminal would obey.

Names and texts come from strangers' files: a tensor's name may hold an order to the terminal. Here
every such character is shown as Python writes it (`\x1b`), whoever reads, a terminal or a pipe.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from apertus_mlx.errors import ResourceError

# C0, DEL and C1; separators of lines and paragraphs; what turns the order of a line around; and
# halves of surrogate pairs, which are no characters and cannot be written.
ORDERS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
# The line that redraws itself at the end of the terminal on stderr, if there is one.
_drawn: list[str] = []
# Whether this process is to say nothing, as another one speaks for it.
_hushed: list[bool] = []
# What a text of several lines keeps.
LAYOUT = "\n\t"


def hush(silent: bool = True) -> None:
    """Print nothing from now on, or all again."""
    _hushed[:] = [True] * silent


def printable(text: str, keep: str = "") -> str:
    r"""Return `text` with what a terminal obeys shown escaped (`\x1b`), but for those in `keep`."""
    return ORDERS.sub(lambda found: _escaped(found[0], keep), text)


def printable_json(text: str) -> str:
    """Return JSON of the same value, with the same escapes as JSON writes them."""
    return ORDERS.sub(lambda found: found[0] if found[0] in "\n" else _json(found[0]), text)


def _escaped(character: str, keep: str) -> str:
    return character if character in keep else character.encode("unicode_escape").decode()


def _json(character: str) -> str:
    return f"\\u{ord(character):04x}"


def put(text: str, end: str = "\n", keep: str = "") -> None:
    """Write data to stdout at once, escaped; ends the program if nobody reads any more.

    Raises:
        ResourceError: it cannot be written, as on a full disk.
    """
    put_exactly(printable(text, keep) + end)


def put_exactly(text: str) -> None:
    """Write data to stdout that is to stay as it is: for a pipe or file, see `put`."""
    if _hushed:
        return
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        _silence(sys.stdout)
        if error.errno == errno.EPIPE:
            # Whoever read has what they wanted (`| head`).
            raise SystemExit(0) from None
        raise ResourceError(f"standard output: cannot be written ({error.strerror})") from None


def note(text: str, end: str = "\n", keep: str = "") -> None:
    """Write to stderr, escaped. What cannot be written there is lost: no result hangs on it."""
    clear()
    _tell(printable(text, keep) + end)


def redraw(line: str) -> None:
    """Draw `line` over the one that stands at the end of the terminal on stderr."""
    _tell(f"\r{printable(line)}\x1b[K")
    _drawn[:] = [line]


def clear() -> None:
    """Leave nothing of the line that redraws itself."""
    if _drawn:
        redraw("")
        _drawn.clear()


def _tell(text: str) -> None:
    if sys.stderr is None or _hushed:
        return
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except OSError:
        _silence(sys.stderr)


def _silence(stream: TextIO) -> None:
    """Let nothing more come out of `stream`, nor fail: Python writes what is left at its exit."""
    with suppress(OSError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def finish() -> None:
    """Leave nothing in stdout that Python could fail to write at its exit."""
    try:
        sys.stdout.flush()
    except OSError:
        _silence(sys.stdout)


@contextmanager
def log_shown() -> Iterator[None]:
    """Print what the package logs, a line each; with APERTUS_MLX_DEBUG=1 details, too."""
    level = logging.DEBUG if os.environ.get("APERTUS_MLX_DEBUG") == "1" else logging.INFO
    logger, handler = logging.getLogger("apertus_mlx"), _Handler(level)
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.level, logger.propagate = before


class _Handler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        note(record.getMessage())


def take_messages() -> None:
    """Have what libraries log or warn of printed here, a line each."""
    logging.basicConfig(handlers=[_Handler(logging.WARNING)])

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        note(f"{category.__name__}: {message}")

    warnings.showwarning = show
