"""`apertus-mlx distill`: a quantized model learns from the one that it was made from."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from apertus_mlx.cli.options import JsonOption, OfflineOption
from apertus_mlx.cli.output import (
    layer_progress,
    note,
    print_data,
    print_json,
    token_progress,
)
from apertus_mlx.errors import UsageError

if TYPE_CHECKING:
    from convert.distill.run import Job
    from convert.distill.student import Trained
    from convert.distill.training import Judgement

REPORT_INTERVAL_S = 10.0


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
        float,
        typer.Option(
            "--learning-rate", help="Highest rate, in steps between neighbouring weight values."
        ),
    ] = 0.02,
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
    from apertus_mlx.hub import locate
    from convert.distill.run import Observer, Options, prepare
    from convert.distill.run import distill as run
    from convert.distill.training import best
    from convert.workspace import partial_path

    if not 0 < learning_rate <= 1:
        raise UsageError(f"--learning-rate {learning_rate}: expected above 0 and at most 1")
    if plot is not None:
        check_plot(plot)
    options = Options(_trained(train), epochs, learning_rate, top_k, seed)
    folder = locate(teacher, revision=None, offline=offline)
    job = prepare(folder, student, teacher, options, text or [], tokens, window)
    if not text:
        note("learning from the small text in the package; --text takes one that suits your use")
    target = out or Path(f"{student.resolve().name}-distilled")
    _announce(job)
    try:
        with (
            token_progress("asking the teacher", job.sample.windows.size) as on_teacher,
            layer_progress("measuring") as on_layer,
        ):
            observer = Observer(on_teacher, _TrainingLog(), on_layer)
            outcome = run(job, target, resume, observer)
    except KeyboardInterrupt:
        note(f"interrupted; --resume goes on where it stopped, {partial_path(target)} holds it")
        raise
    if plot is not None:
        _draw(plot, outcome.history, target.name)
    first, kept = outcome.history[0], best(outcome.history)
    note(
        f"divergence from the teacher on held-out text: {first.held_out_divergence:.4f} -> "
        f"{kept.held_out_divergence:.4f} nats"
    )
    if json:
        print_json(outcome.as_json(target))
    else:
        print_data(str(target))


class _TrainingLog:
    """Lines on stderr while a student learns: every few seconds, and at each judgement."""

    def __init__(self) -> None:
        self._judged = 0
        self._first: tuple[float, int] | None = None
        self._last = time.monotonic()

    def __call__(self, done: int, total: int, loss: float, history: Sequence[Judgement]) -> None:
        now = time.monotonic()
        self._first = self._first or (now, done)
        if len(history) == self._judged and now - self._last < REPORT_INTERVAL_S:
            return
        line = f"learning: {done:,} of {total:,} tokens, loss {loss:.4f}"
        if len(history) != self._judged:
            line += f", held out {history[-1].held_out_loss:.4f}"
        rate = (done - self._first[1]) / max(now - self._first[0], 1e-9)
        if rate > 0:
            line += f", {rate:,.0f} tokens/s, {(total - done) / rate:.0f} s left"
        note(line)
        self._judged, self._last = len(history), now


def _trained(text: str) -> Trained:
    from convert.distill.student import TRAINED

    for trained in TRAINED:
        if text == trained:
            return trained
    raise UsageError(f"--train {text[:40]!r}: expected {' or '.join(TRAINED)}")


def _announce(job: Job) -> None:
    windows, length = job.sample.windows.shape
    note(
        f"{windows * length:,} tokens in windows of {length}, {job.options.epochs} times; "
        f"{len(job.held_out)} windows held out; the teacher names {job.options.top_k} tokens each"
    )


def _draw(path: Path, history: Sequence[Judgement], name: str) -> None:
    from apertus_mlx.cli.plot import Series, save_plot

    trained = [(j.tokens, j.training_loss) for j in history if j.training_loss is not None]
    save_plot(
        path,
        [
            Series("training", [tokens for tokens, _ in trained], [loss for _, loss in trained]),
            Series("held out", [j.tokens for j in history], [j.held_out_loss for j in history]),
        ],
        "tokens",
        "loss in nats (0.9 KL + 0.1 cross-entropy)",
        name,
    )
