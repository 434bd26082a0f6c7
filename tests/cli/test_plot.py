"""Plots: labels at the lines, none on another, and rates that begin at 0."""

from __future__ import annotations

import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from apertus_mlx.cli.plot import Series, check_plot, save_plot
from apertus_mlx.errors import UsageError

LINES = [
    Series("ours", [0, 1024, 4096], [100, 90, 70], [3, 3, 2]),
    Series("theirs", [0, 1024, 4096], [95, 88, 69.5], [3, 3, 2]),
    Series("a third", [0, 1024, 4096], [94, 87, 69.0]),
    Series("roofline", [0, 1024, 4096], [140, 120, 95], is_limit=True),
]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are saved."""
    found: list[Any] = []
    figure = pytest.importorskip("matplotlib.figure").Figure
    draw = figure.savefig

    def save(self: Any, target: Path, **options: Any) -> None:
        found.append(self)
        draw(self, target, **options)

    monkeypatch.setattr(figure, "savefig", save)
    return found


def test_lines_have_their_labels_at_their_ends(tmp_path: Path, figures: list[Any]) -> None:
    save_plot(tmp_path / "speed.svg", LINES, "depth", "tokens/s", "speed", from_zero=True)
    [axes] = figures[0].axes
    assert axes.get_legend() is None and axes.get_ylim()[0] == 0
    labels = {text.get_text(): text for text in axes.texts}
    assert list(labels) == [line.label for line in LINES]
    for line in LINES:
        end = axes.transData.transform((line.x[-1], line.y[-1]))
        box = labels[line.label].get_window_extent()
        assert box.x0 > end[0] and abs((box.y0 + box.y1) / 2 - end[1]) < 60
    boxes = [label.get_window_extent() for label in labels.values()]
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
    right = figures[0].bbox.x1
    assert all(box.x1 <= right + 1 for box in boxes)


@pytest.mark.filterwarnings("error")
def test_a_divergence_of_0_has_its_label_at_the_bottom(tmp_path: Path, figures: list[Any]) -> None:
    lines = [Series("q4", [300.0], [0.02]), Series("itself", [900.0], [0.0])]
    lines.append(Series("noise floor", [300.0, 900.0], [1e-4, 1e-4], is_limit=True))
    save_plot(tmp_path / "kl.svg", lines, "MB", "KL", "kl", log_y=True)
    [axes] = figures[0].axes
    labels = {text.get_text(): text.get_window_extent() for text in axes.texts}
    frame = axes.get_window_extent()
    assert frame.height > 100 and list(labels) == ["q4", "itself", "noise floor"]
    assert abs(labels["itself"].y0 - frame.y0) < 30
    assert not any(one.overlaps(other) for one, other in combinations(labels.values(), 2))


def test_a_limit_is_a_broken_line_and_other_axes_fit_the_data(
    tmp_path: Path, figures: list[Any]
) -> None:
    save_plot(tmp_path / "loss.svg", LINES, "tokens", "loss", "loss")
    [axes] = figures[0].axes
    assert axes.get_ylim()[0] > 0
    dashed = [line for line in axes.lines if line.get_linestyle() == "--"]
    assert [list(line.get_ydata()) for line in dashed] == [[140, 120, 95]]


def test_who_lacks_matplotlib_is_told_a_package_that_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError, match=r"pip install matplotlib$"):
        check_plot(tmp_path / "speed.svg")
