"""The forms in which commands show things: data on stdout, everything else on stderr."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

from apertus_mlx.system import sink

if TYPE_CHECKING:
    from apertus_mlx.generation.run import Piece

PLAIN_PROGRESS_INTERVAL_S = 5.0

# A context that yields `update(done)`, or `update(done, total)` where the total comes late.
_Progress = AbstractContextManager[Callable[..., None]]


def print_data(text: str, end: str = "\n") -> None:
    """Write a line of a command's result to stdout at once; see `sink.put`."""
    sink.put(text, end)


def print_json(value: Mapping[str, Any]) -> None:
    """Write one JSON object to stdout."""
    encoding = (sys.stdout.encoding or "").lower().replace("-", "")
    text = json.dumps(value, ensure_ascii=encoding != "utf8", indent=2)
    sink.put_exactly(sink.printable_json(text) + "\n")


def note(text: str) -> None:
    """Write one line for the person to stderr."""
    sink.note(text)


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Write an aligned plain-text table to stdout; the first column is left-aligned."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        print_data("  ".join(cells).rstrip())


def format_bytes(size_bytes: float) -> str:
    """Bytes in decimal units, as disks and app stores count them."""
    for unit in ("B", "kB", "MB"):
        if abs(size_bytes) < 1000:
            return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:.2f} GB"


def print_pieces(pieces: Iterable[Piece]) -> None:
    """Write an answer to stdout as it comes, and the deliberation before it to stderr.

    On a terminal with controls escaped: a model's text must not give it orders. Into a pipe or
    file as it is.
    """
    exact = not sys.stdout.isatty()
    thinking = False
    for piece in pieces:
        if thinking and not piece.is_thought:
            note("")
        thinking = piece.is_thought
        if thinking:
            sink.note(piece.text, end="", keep=sink.LAYOUT)
        elif exact:
            sink.put_exactly(piece.text)
        else:
            sink.put(piece.text, end="", keep=sink.LAYOUT)
    if thinking:
        note("")


def byte_progress(label: str, total_bytes: int | None = None) -> _Progress:
    """Progress in bytes; see `_progress`."""
    return _progress(label, total_bytes, format_bytes)


def layer_progress(label: str) -> _Progress:
    """Progress in layers of the model; see `_progress`."""
    return _progress(label, None, lambda count: f"{count:,.1f} layers")


def token_progress(label: str, total_tokens: int) -> _Progress:
    """Progress in tokens; see `_progress`."""
    return _progress(label, total_tokens, lambda count: f"{count:,.0f} tokens")


@contextmanager
def _progress(
    label: str, total: int | None, shown: Callable[[float], str]
) -> Iterator[Callable[..., None]]:
    """Show progress on stderr once it has taken a second; yields a function of what is done.

    On a terminal one line that redraws itself, elsewhere a plain line every few seconds.
    """
    entered = last = time.monotonic()
    first: tuple[float, int] | None = None
    terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    drawn = False

    def update(done: int, of: int | None = total) -> None:
        nonlocal last, first, drawn
        now = time.monotonic()
        # The rate counts from the first report: other work may have come before it.
        first = first or (now, done)
        if now - entered < 1 or now - last < (0.1 if terminal else PLAIN_PROGRESS_INTERVAL_S):
            return
        last, drawn = now, True
        line = f"{label}: {shown(done)}" + (f" of {shown(of)}" if of else "")
        rate = (done - first[1]) / max(now - first[0], 1e-9)
        if rate > 0:
            line += f", {shown(rate)}/s"
            line += f", {(of - done) / rate:.0f} s left" if of else ""
        if terminal:
            # A line that wraps could not be drawn over.
            line = line[: shutil.get_terminal_size().columns - 1]
            sink.redraw(line)
        else:
            note(line)

    try:
        yield update
    finally:
        if terminal and drawn:
            sink.redraw("")
