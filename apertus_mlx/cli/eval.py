"""`apertus-mlx eval`: what quantized models lost, against their reference or in standard tasks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from apertus_mlx.cli.options import JsonOption, PlotOption
from apertus_mlx.cli.output import Table, print_report
from apertus_mlx.cli.progress import show_progress
from apertus_mlx.cli.sink import note
from apertus_mlx.errors import UsageError
from apertus_mlx.measure.tasks.options import TaskOptions
from apertus_mlx.system.arguments import Option
from apertus_mlx.system.sizes import format_bytes
from apertus_mlx.tools import evaluate as run
from apertus_mlx.tools import evaluate_tasks

if TYPE_CHECKING:
    from apertus_mlx.convert.evaluation.evaluate import Evaluation
    from apertus_mlx.quant.metrics import Divergence
    from apertus_mlx.tools import Comparison

HEADER = ("tokens", "KL mean", "median", "p90", "confident", "floor", "top-1", "ppl", "ppl +")


# The name of the command; `eval` itself is Python's.
def evaluate(
    given: Annotated[dict[str, Any], run],
    *,
    tasks: Annotated[
        Sequence[str] | None,
        Option("Score in these tasks of lm-eval instead; names with commas.", metavar="NAMES"),
    ] = None,
    task_options: TaskOptions,
    out: Annotated[
        Path | None,
        Option("With --tasks: JSON file for scores; answers are kept beside it, to go on from."),
    ] = None,
    plot: PlotOption = None,
    json: JsonOption = False,
) -> None:
    """Measure how far each MODEL's predictions are from those of the reference.

    With --tasks: score MODELS in tasks of lm-eval (extra `eval`). apertus-post, apertus-pre and
    swissai_eval are the lists of the Apertus cards, plain_facts comes with the package. 95 %: the
    confidence interval.

    With --languages: the ten languages that lose most, worst first, and the median. tok/char:
    tokens that a character takes; ±: the 95 % confidence interval of KL mean on more such text, if
    each token is a sample by itself.

    Every row is a language, the last one all of them. Smaller is nearer, but for top-1.

    tokens: predictions that were compared. KL mean, median, p90: the Kullback-Leibler divergence of
    a prediction from the reference's, in nats: over all tokens, in the middle, and what nine in ten
    stay below.

    confident: the mean where the reference gives one token 90 % or more. floor: the mean that the
    reference has from itself when it computes in bfloat16; a difference below it says nothing.

    top-1: how often both hold the same token likeliest. ppl: the model's perplexity on the text;
    ppl +: how much that is above the reference's.
    """
    from apertus_mlx.cli.plot import check_plot

    if plot is not None:
        check_plot(plot)
    if tasks is not None:
        _score(given, tasks, task_options, out, plot, json)
        return
    if task_options != TaskOptions() or out is not None:
        raise UsageError("--chat, --limit, --out and the like are for --tasks")
    with show_progress() as progress:
        found = run(**given, progress=progress)
    print_report(json, found.as_json, lambda: _words(found, given["tokens"]))
    if not json:
        _note_floor()
    # Last, since it can fail where the work has not.
    if plot is not None:
        _draw(found.models, plot)


def _score(
    given: Mapping[str, Any],
    tasks: Sequence[str],
    options: TaskOptions,
    out: Path | None,
    plot: Path | None,
    json: bool,
) -> None:
    from apertus_mlx.cli.task_scores import draw_scores, score_table

    if (
        any(given[name] is not None for name in ("reference", "reference_revision", "text"))
        or (given["languages"])
    ):
        raise UsageError("--tasks: has questions of its own; leave out --reference and texts")
    if given["tokens"] is not None:
        raise UsageError("--tokens: is for texts; --limit bounds the questions of --tasks")
    shared = {name: given[name] for name in ("models", "revision", "offline")}
    with show_progress() as progress:
        found = evaluate_tasks(tasks=tasks, out=out, progress=progress, **shared, **asdict(options))
    print_report(json, found.as_json, lambda: [score_table(found.models)])
    if plot is not None:
        draw_scores(found.models, plot)


def _words(found: Comparison, most_read: int | None) -> list[str | Table]:
    if not found.tokens_per_character:
        return [_table(found.models)]
    from apertus_mlx.cli.language_losses import language_table, most_tokens, tokens_read

    return [
        language_table(found.models, found.tokens_per_character),
        most_tokens(found.tokens_per_character),
        tokens_read(found.text_tokens, most_read),
    ]


def _table(evaluations: Mapping[str, Evaluation]) -> Table:
    one = len(evaluations) == 1
    header = ["text", *HEADER] if one else ["model", "size", "text", *HEADER]
    return Table(
        header,
        [
            row if one else [label, format_bytes(evaluation.weight_bytes), *row]
            for label, evaluation in evaluations.items()
            for row in _rows(evaluation)
        ],
    )


def _note_floor() -> None:
    from apertus_mlx.convert.evaluation.evaluate import FLOOR

    note(f"KL in nats; floor: {FLOOR}; apertus-mlx eval --help explains every column")


def _draw(evaluations: Mapping[str, Evaluation], path: Path) -> None:
    from apertus_mlx.cli.plot import Series, save_plot

    series = [
        Series(label, [evaluation.weight_bytes / 1e6], [evaluation.overall.kl_mean])
        for label, evaluation in evaluations.items()
    ]
    floor = next(iter(evaluations.values())).overall_floor.kl_mean
    sizes = [line.x[0] for line in series]
    series.append(Series("noise floor", [min(sizes), max(sizes)], [floor, floor], is_limit=True))
    title = "Divergence by size"
    save_plot(path, series, "weights, MB", "mean KL divergence, nats", title, log_y=True)


def _rows(evaluation: Evaluation) -> Iterator[list[str]]:
    for language, (found, floor) in evaluation.languages.items():
        yield _row(language, found, floor)
    yield _row("all", evaluation.overall, evaluation.overall_floor)


def _row(label: str, found: Divergence, floor: Divergence) -> list[str]:
    return [
        label,
        str(found.tokens),
        *(f"{value:.5f}" for value in (found.kl_mean, found.kl_median, found.kl_p90)),
        "-" if found.kl_confident is None else f"{found.kl_confident:.5f}",
        f"{floor.kl_mean:.1e}",
        f"{found.top1_agreement:.2%}",
        "-" if found.perplexity is None else f"{found.perplexity:.3f}",
        "-" if found.perplexity_difference is None else f"{found.perplexity_difference:+.3f}",
    ]
