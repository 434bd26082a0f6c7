"""What `apertus-mlx eval --tasks` shows: a table of scores, and their plot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from apertus_mlx.cli.output import Table
from apertus_mlx.system.sizes import format_bytes

if TYPE_CHECKING:
    from apertus_mlx.measure.tasks.run import ModelScores, Score

TASK_HEADER = ("task", "model", "size", "n", "metric", "score", "95 %")


def score_table(models: Mapping[str, ModelScores]) -> Table:
    """A row for each task, metric and model, models side by side."""
    return Table(TASK_HEADER, list(_rows(models)))


def _rows(models: Mapping[str, ModelScores]) -> Iterator[list[str]]:
    keys = dict.fromkeys(
        (score.task, score.metric) for found in models.values() for score in found.scores
    )
    for key in keys:
        for label, found in models.items():
            for score in found.scores:
                if (score.task, score.metric) == key:
                    ends = score.interval
                    yield [
                        score.task,
                        label,
                        format_bytes(found.weight_bytes),
                        "-" if score.questions is None else str(score.questions),
                        score.metric,
                        f"{score.value:.4f}",
                        "-" if ends is None else f"{ends[0]:.3f} to {ends[1]:.3f}",
                    ]


def draw_scores(models: Mapping[str, ModelScores], path: Path) -> None:
    """Plot the first metric of each task over the models' bytes, a line for each task."""
    from apertus_mlx.cli.plot import Series, save_plot

    by_size = sorted(models.values(), key=lambda found: found.weight_bytes)
    series = []
    for task in dict.fromkeys(score.task for found in by_size for score in found.scores):
        first = [
            (found.weight_bytes / 1e6, next(s for s in found.scores if s.task == task))
            for found in by_size
            if any(score.task == task for score in found.scores)
        ]
        series.append(
            Series(
                f"{task}, {first[0][1].metric}",
                [size for size, _ in first],
                [score.value for _, score in first],
                [_half(score) for _, score in first],
            )
        )
    save_plot(path, series, "weights, MB", "score, 95 % intervals", "Tasks by size")


def _half(score: Score) -> float:
    """Half of its interval, for an error bar."""
    ends = score.interval
    return 0.0 if ends is None else (ends[1] - ends[0]) / 2
