"""The one place that prints: data on stdout, everything else on stderr."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

PLAIN_PROGRESS_INTERVAL_S = 5.0


def print_data(text: str, end: str = "\n") -> None:
    """Write a command's result to stdout at once."""
    sys.stdout.write(text + end)
    sys.stdout.flush()


def print_json(value: Mapping[str, Any]) -> None:
    """Write one JSON object to stdout."""
    print_data(json.dumps(value, ensure_ascii=False, indent=2))


def note(text: str) -> None:
    """Write one line for the person to stderr."""
    print(text, file=sys.stderr, flush=True)


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


@contextmanager
def byte_progress(label: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """Show progress of `total_bytes` on stderr; yields a function that takes the bytes done.

    On a terminal one line that redraws itself, elsewhere a plain line every few seconds.
    """
    started = last = time.monotonic()
    terminal = sys.stderr.isatty()

    def update(done_bytes: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < (0.1 if terminal else PLAIN_PROGRESS_INTERVAL_S):
            return
        last = now
        rate = done_bytes / max(now - started, 1e-9)
        left_s = (total_bytes - done_bytes) / max(rate, 1e-9)
        line = (
            f"{label}: {format_bytes(done_bytes)} of {format_bytes(total_bytes)}, "
            f"{format_bytes(rate)}/s, {left_s:.0f} s left"
        )
        print(f"\r{line}\x1b[K" if terminal else line, end="" if terminal else "\n",
              file=sys.stderr, flush=True)  # fmt: skip

    try:
        yield update
    finally:
        if terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
