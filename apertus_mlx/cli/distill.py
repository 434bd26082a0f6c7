"""`apertus-mlx distill`: a quantized model learns from the one that it was made from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from apertus_mlx.cli.options import JsonOption, OfflineOption
from apertus_mlx.cli.output import print_report
from apertus_mlx.cli.progress import show_progress

if TYPE_CHECKING:
    from apertus_mlx.convert.distill.training import Validation


def distill(
    teacher: Annotated[str, typer.Argument(help="Model folder or Hub id to learn from.")],
    student: Annotated[
        Path, typer.Argument(metavar="STUDENT_DIR", help="Quantized folder made by convert.")
    ],
    out: Annotated[
        Path | None,
        typer.Argument(help="Output folder; default: the student's name and -distilled, here."),
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            "--text", help="Text, JSONL or chat file, or folder of such; default: built in, small."
        ),
    ] = None,
    tokens: Annotated[
        int, typer.Option("--tokens", min=2, max=2**31, help="Most tokens to learn from.")
    ] = 2**20,
    epochs: Annotated[
        int, typer.Option("--epochs", min=1, max=10_000, help="How often each text is seen.")
    ] = 1,
    window: Annotated[
        int, typer.Option("--window", min=2, max=2**16, help="Tokens that are read in one piece.")
    ] = 256,
    train: Annotated[
        str, typer.Option("--train", help="weights, or scales (and norms) with codes as they are.")
    ] = "weights",
    learning_rate: Annotated[
        float, typer.Option("--learning-rate", help="Highest rate, relative to a typical scale.")
    ] = 1e-3,
    text_share: Annotated[
        float,
        typer.Option(
            "--text-share",
            help="Share of the text itself in the loss; 0 follows the teacher alone.",
        ),
    ] = 0.1,
    top_k: Annotated[
        int, typer.Option("--top-k", min=1, max=4096, help="Tokens that the teacher names.")
    ] = 64,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Same seed, same result.")] = 0,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw the losses into this SVG, PNG or PDF file.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an interrupted distillation.")
    ] = False,
    json: JsonOption = False,
    offline: OfflineOption = False,
) -> None:
    """Let STUDENT_DIR learn from TEACHER; writes a folder of the same format and size."""
    from apertus_mlx.cli.plot import check_plot
    from apertus_mlx.cli.resumable import resumable
    from apertus_mlx.tools import distill as run

    if plot is not None:
        check_plot(plot)
    with resumable(), show_progress() as progress:
        done = run(
            teacher,
            student,
            out,
            text=text,
            tokens=tokens,
            epochs=epochs,
            window=window,
            train=train,
            learning_rate=learning_rate,
            text_share=text_share,
            top_k=top_k,
            seed=seed,
            resume=resume,
            offline=offline,
            progress=progress,
        )
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
