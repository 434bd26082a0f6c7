"""Progress on stderr: tqdm words it; when it is shown, and how, is decided here."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from apertus_mlx.cli import sink
from apertus_mlx.system.progress import OnProgress, Progress

# Seconds: before a stage is shown at all, between two drawings, between two lines in a log.
DELAY_S, DRAWING_INTERVAL_S, LINE_INTERVAL_S = 1.0, 0.1, 10.0
_UNITS = {
    "bytes": "B", "layers": " layer runs", "tokens": " tokens", "requests": " requests",
}  # fmt: skip


@contextmanager
def show_progress() -> Iterator[OnProgress]:
    """Yield a function that shows progress on stderr once a stage has taken a second.

    On a terminal as one line that redraws itself, elsewhere as a line every ten seconds.
    """
    try:
        yield _Printer()
    finally:
        sink.clear()


@contextmanager
def byte_progress(stage: str, total_bytes: int | None = None) -> Iterator[Callable[..., None]]:
    """Yield a function of bytes done, and of all bytes where these are known late."""
    with show_progress() as show:
        yield lambda done, total=total_bytes: show(Progress(stage, done, total, "bytes"))


@contextmanager
def token_progress(stage: str, total_tokens: int) -> Iterator[Callable[..., None]]:
    """Yield a function of tokens done."""
    with show_progress() as show:
        yield lambda done: show(Progress(stage, done, total_tokens, "tokens"))


class _Printer:
    def __init__(self) -> None:
        self._terminal = sys.stderr is not None and (
            sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        )
        self._stage = ""
        self._began = self._shown = 0.0
        self._initial = self._latest = 0

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        if progress.stage != self._stage or progress.done < self._latest:
            sink.clear()
            # The rate counts from the first report: other work may have come before it.
            self._stage, self._initial = progress.stage, progress.done
            self._began = self._shown = now
        self._latest = progress.done
        interval = DRAWING_INTERVAL_S if self._terminal else LINE_INTERVAL_S
        if now - self._began < DELAY_S or now - self._shown < interval:
            return
        self._shown = now
        columns = shutil.get_terminal_size().columns - 1 if self._terminal else None
        line = _line(progress, now - self._began, self._initial, columns)
        if self._terminal:
            # A line that wraps could not be drawn over.
            sink.redraw(line[:columns])
        else:
            sink.note(line)


def _line(progress: Progress, elapsed_s: float, initial: int, columns: int | None) -> str:
    from tqdm import tqdm

    form = "{desc}: {n_fmt}{unit}, {rate_noinv_fmt}{postfix}"
    if progress.total:
        bar = "|{bar}| " if columns is not None else ""
        form = f"{{desc}}: {bar}{{n_fmt}}/{{total_fmt}}{{unit}}, {{rate_noinv_fmt}}"
        # What comes after the last unit, as after the last layer the head, has no time known.
        form += ", {remaining} left{postfix}" if progress.done < progress.total else "{postfix}"
    line: str = tqdm.format_meter(
        progress.done,
        progress.total,
        elapsed_s,
        columns,
        progress.stage,
        unit=_UNITS[progress.unit],
        unit_scale=progress.unit != "layers",
        ascii="utf" not in (getattr(sys.stderr, "encoding", None) or "").lower(),
        bar_format=form,
        postfix=progress.detail,
        initial=initial,
    )
    return line
