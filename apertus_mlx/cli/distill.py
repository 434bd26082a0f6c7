"""`apertus-mlx distill`: a quantized model learns from the one that it was made from."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from apertus_mlx.cli.options import JsonOption, OfflineOption
from apertus_mlx.cli.output import note, print_data, print_json
from apertus_mlx.errors import UsageError

if TYPE_CHECKING:
    from apertus_mlx.convert.distill.run import Job
    from apertus_mlx.convert.distill.student import Trained
    from apertus_mlx.convert.distill.training import Validation

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
    from apertus_mlx.convert.distill.run import Observer, Options, prepare
    from apertus_mlx.convert.distill.run import distill as run
    from apertus_mlx.convert.distill.training import best
    from apertus_mlx.hub import locate

    if not 0 < learning_rate <= 1:
        raise UsageError(f"--learning-rate {learning_rate}: expected above 0 and at most 1")
    if not 0 <= text_share <= 1:
        raise UsageError(f"--text-share {text_share}: expected a share from 0 to 1")
    if plot is not None:
        check_plot(plot)
    options = Options(_trained(train), epochs, learning_rate, text_share, top_k, seed)
    folder = locate(teacher, revision=None, offline=offline)
    name = folder.resolve().name if Path(teacher).expanduser().exists() else teacher
    job = prepare(folder, student, name, options, text or [], tokens, window)
    if not text:
        note("learning from the small text in the package; --text takes one that suits your use")
    target = out or Path(f"{student.resolve().name}-distilled")
    _announce(job)
    observer = Observer(
        _Log("asking the teacher", "tokens"), _TrainingLog(), _Log("measuring", "layers")
    )
    with resumable():
        outcome = run(job, target, resume, observer)
    first, kept = outcome.history[0], best(outcome.history)
    note(
        f"divergence from the teacher on held-out text: {first.held_out_divergence:.4f} -> "
        f"{kept.held_out_divergence:.4f} nats"
    )
    if json:
        print_json(outcome.as_json(target))
    else:
        print_data(str(target))
    # Last, since it can fail where the work has not.
    if plot is not None:
        _draw(plot, outcome.history, target.name)


class _Log:
    """A stage on stderr: a line every few seconds, with the rate and the time left.

    Lines instead of one that redraws itself: a long run's history is worth keeping.
    """

    def __init__(self, label: str, unit: str) -> None:
        self._label, self._unit = label, unit
        self._first: tuple[float, int] | None = None
        self._last = time.monotonic()

    def __call__(self, done: int, total: int, detail: str = "", at_once: bool = False) -> None:
        now = time.monotonic()
        self._first = self._first or (now, done)
        if not at_once and now - self._last < REPORT_INTERVAL_S:
            return
        self._last = now
        line = f"{self._label}: {done:,} of {total:,} {self._unit}{detail}"
        rate = (done - self._first[1]) / max(now - self._first[0], 1e-9)
        if rate > 0:
            line += f", {rate:,.1f} {self._unit}/s, {(total - done) / rate:.0f} s left"
        note(line)


class _TrainingLog:
    """The stage in which the student learns, with its losses; each validation is a line."""

    def __init__(self) -> None:
        self._log = _Log("learning", "tokens")
        self._judged = 0

    def __call__(self, done: int, total: int, loss: float, history: Sequence[Validation]) -> None:
        detail = f", loss {loss:.4f}"
        judged = len(history) != self._judged
        if judged:
            self._judged = len(history)
            detail += f", held out {history[-1].held_out_loss:.4f}"
        self._log(done, total, detail, at_once=judged)


def _trained(text: str) -> Trained:
    from apertus_mlx.convert.distill.student import TRAINED

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
