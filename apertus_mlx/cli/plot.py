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
# From one label to the next.
LABEL_POINTS = 12


@dataclass(frozen=True, slots=True)
class Series:
    """One line: points with an optional spread (half the height of its error bars).

    `is_limit`: what the others are compared with, such as a roofline: a broken line, no points.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    spread: Sequence[float] | None = None
    is_limit: bool = False


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
        raise UsageError("--plot: needs matplotlib: pip install matplotlib") from None


def save_plot(
    path: Path,
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    title: str,
    *,
    log_y: bool = False,
    from_zero: bool = False,
) -> None:
    """Draw `series` into the file `path`, there whole or not at all; its ending gives the format.

    Each line has its label at its end. `from_zero` is for rates: half the height is half as fast.

    Raises:
        UsageError: see `check_plot`.
        ResourceError: the file cannot be written.
    """
    check_plot(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes: Any = figure.subplots()
    drawn = []
    for line in series:
        form = {"linestyle": "--", "color": "0.5"} if line.is_limit else {"marker": "o"}
        drawn.append(axes.errorbar(line.x, line.y, yerr=line.spread, capsize=3, **form)[0])
    axes.set(xlabel=x_label, ylabel=y_label, title=title)
    if log_y:
        axes.set_yscale("log")
    if from_zero:
        axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    bottom, top = axes.get_ylim()
    ends = [
        axes.annotate(
            line.label,
            # A logarithm has no place for 0, which is then at the bottom.
            (line.x[-1], min(max(line.y[-1], bottom), top)),
            xytext=(7, -3),
            textcoords="offset points",
            color=points.get_color(),
            annotation_clip=False,
        )
        for line, points in zip(series, drawn, strict=True)
        if len(line.x)
    ]
    _set_apart(figure, axes, ends)
    # Without a date in the file, the same figures give the same bytes.
    metadata = {"Date": None} if path.suffix.lower() == ".svg" else None
    try:
        with whole_file(path) as beside:
            figure.savefig(beside, metadata=metadata)
    except OSError as error:
        raise ResourceError(f"--plot {path}: {error.strerror}") from None


def _set_apart(figure: Any, axes: Any, labels: Sequence[Any]) -> None:
    """Move labels up where they would lie on each other."""
    figure.draw_without_rendering()
    to_points = 72 / figure.dpi

    def place(label: Any) -> tuple[float, float]:
        x, y = axes.transData.transform(label.xy)
        return x * to_points, y * to_points

    taken: list[tuple[float, float]] = []
    for label in sorted(labels, key=lambda each: place(each)[1]):
        x, y = place(label)
        width = 6 * len(label.get_text())
        below = [top for left, top in taken if abs(left - x) < width]
        moved = max([y, *(top + LABEL_POINTS for top in below)])
        label.xyann = (7, moved - y - 3)
        taken.append((x, moved))
