"""Line plots as SVG, PNG or PDF files, with matplotlib where it is installed."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apertus_mlx.errors import ResourceError, UsageError
from apertus_mlx.system.whole_file import whole_file

FORMATS = (".svg", ".png", ".pdf")


@dataclass(frozen=True, slots=True)
class Series:
    """One line: points with an optional spread (half the height of its error bars)."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    spread: Sequence[float] | None = None


def check_plot(path: Path) -> None:
    """Refuse what `save_plot` could not write, before any work is done.

    Raises:
        UsageError: matplotlib is missing, or the file's name ends in none of `FORMATS`.
    """
    if path.suffix.lower() not in FORMATS:
        raise UsageError(f"--plot {path}: expected a name ending in {', '.join(FORMATS)}")
    if not path.resolve().parent.is_dir():
        raise UsageError(f"--plot {path}: its folder does not exist")
    if path.is_dir():
        raise UsageError(f"--plot {path}: is a folder")
    try:
        # At its import matplotlib obeys a matplotlibrc of the current folder, a model's perhaps.
        with chdir(Path(__file__).parent):
            import matplotlib  # noqa: F401
    except ImportError:
        raise UsageError("--plot: install matplotlib: pip install 'apertus-mlx[plot]'") from None


def save_plot(
    path: Path,
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    title: str,
    *,
    log_y: bool = False,
) -> None:
    """Draw `series` into the file `path`, there whole or not at all; its ending gives the format.

    Raises:
        UsageError: see `check_plot`.
        ResourceError: the file cannot be written.
    """
    check_plot(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes: Any = figure.subplots()
    for line in series:
        axes.errorbar(line.x, line.y, yerr=line.spread, label=line.label, marker="o", capsize=3)
    axes.set(xlabel=x_label, ylabel=y_label, title=title)
    if log_y:
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    if len(series) > 1:
        axes.legend()
    # Without a date in the file, the same figures give the same bytes.
    metadata = {"Date": None} if path.suffix.lower() == ".svg" else None
    try:
        with whole_file(path) as beside:
            figure.savefig(beside, metadata=metadata)
    except OSError as error:
        raise ResourceError(f"--plot {path}: {error.strerror}") from None
