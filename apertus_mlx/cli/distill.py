"""`apertus-mlx distill`: a quantized model learns from the one that it was made from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from apertus_mlx.cli.options import JsonOption, PlotOption
from apertus_mlx.cli.output import print_report
from apertus_mlx.cli.progress import show_progress
from apertus_mlx.tools import distill as run

if TYPE_CHECKING:
    from apertus_mlx.convert.distill.training import Validation


def distill(
    given: Annotated[dict[str, Any], run],
    *,
    plot: PlotOption = None,
    json: JsonOption = False,
) -> None:
    """Let STUDENT_DIR learn from TEACHER; writes a folder of the same format and size."""
    from apertus_mlx.cli.plot import check_plot

    if plot is not None:
        check_plot(plot)
    with show_progress() as progress:
        done = run(**given, progress=progress)
    print_report(json, done.as_json, lambda: [str(done.output)])
    # Last, since it can fail where the work has not.
    if plot is not None:
        _draw(plot, done.history, done.output.name)


def _draw(path: Path, history: Sequence[Validation], name: str) -> None:
    from apertus_mlx.cli.plot import Series, save_plot

    trained = [(j.tokens, j.training_loss) for j in history if j.training_loss is not None]
    save_plot(
        path,
        [
            Series("training", [tokens for tokens, _ in trained], [loss for _, loss in trained]),
            Series("held out", [j.tokens for j in history], [j.held_out_loss for j in history]),
        ],
        "tokens",
        "loss in nats",
        name,
    )
