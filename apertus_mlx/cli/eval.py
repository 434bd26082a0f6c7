"""`apertus-mlx eval`: what quantized models lost, against the model that they were made from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apertus_mlx.cli.options import JsonOption, OfflineOption, RevisionOption
from apertus_mlx.cli.output import format_bytes, layer_progress, note, print_json, print_table
from apertus_mlx.errors import UsageError

if TYPE_CHECKING:
    from apertus_mlx.convert.evaluation.evaluate import Evaluation
    from apertus_mlx.quant.metrics import Divergence

HEADER = ("tokens", "KL mean", "median", "p90", "confident", "floor", "top-1", "ppl", "+")


# The name of the command; `eval` itself is Python's.
def evaluate(
    models: Annotated[list[str], typer.Argument(help="Model folders or Hub ids.", metavar="MODEL")],
    reference: Annotated[
        str, typer.Option("--reference", help="Model folder or Hub id that they should equal.")
    ],
    text: Annotated[
        list[Path] | None,
        typer.Option(
            "--text", help="Text, JSONL or chat file, or folder of such; default: built in."
        ),
    ] = None,
    tokens: Annotated[
        int, typer.Option("--tokens", min=2, max=2**24, help="Most tokens per language.")
    ] = 2048,
    plot: Annotated[
        Path | None,
        typer.Option(
            "--plot", help="Draw divergence against bytes into this SVG, PNG or PDF file."
        ),
    ] = None,
    json: JsonOption = False,
    revision: RevisionOption = None,
    reference_revision: Annotated[
        str | None,
        typer.Option("--reference-revision", help="Branch, tag or commit of the reference."),
    ] = None,
    offline: OfflineOption = False,
) -> None:
    """Measure how far each MODEL's predictions are from those of the reference."""
    from apertus_mlx.cli.plot import check_plot
    from apertus_mlx.convert.evaluation.evaluate import measure_all
    from apertus_mlx.convert.evaluation.texts import hold_out, read_texts
    from apertus_mlx.hub import locate

    if plot is not None:
        check_plot(plot)
    labels = _labels(models)
    # Of the texts in the package those that no conversion calibrates on.
    texts = read_texts(text) if text else hold_out(read_texts())[1]
    folders = _locate_all(models, revision, offline)
    origin = locate(reference, revision=reference_revision, offline=offline)
    with layer_progress("measuring") as update:
        found = measure_all(folders, origin, texts, tokens, update)
    evaluations = dict(zip(labels, found, strict=True))
    if json:
        print_json(_as_json(evaluations))
    else:
        _print(evaluations)
    # Last, since it can fail where the work has not.
    if plot is not None:
        _draw(evaluations, plot)


def _print(evaluations: Mapping[str, Evaluation]) -> None:
    from apertus_mlx.convert.evaluation.evaluate import FLOOR

    one = len(evaluations) == 1
    header = ["text", *HEADER] if one else ["model", "size", "text", *HEADER]
    print_table(
        header,
        [
            row if one else [label, format_bytes(evaluation.weight_bytes), *row]
            for label, evaluation in evaluations.items()
            for row in _rows(evaluation)
        ],
    )
    note(f"KL divergence in nats; floor: {FLOOR}")


def _labels(models: Sequence[str]) -> list[str]:
    """A short name for each model: the folder's, or all that was given where two share one."""
    names = [
        model if not Path(model).expanduser().is_dir() else Path(model).expanduser().resolve().name
        for model in models
    ]
    labels = [
        name if names.count(name) == 1 else model for name, model in zip(names, models, strict=True)
    ]
    for label in labels:
        if labels.count(label) > 1:
            raise UsageError(f"{label}: is given twice")
    return labels


def _locate_all(models: Sequence[str], revision: str | None, offline: bool) -> list[Path]:
    """The folders of all; `revision` is that of those from the Hub, of which there must be one."""
    from apertus_mlx.hub import locate

    local = [Path(model).expanduser().exists() for model in models]
    mixed = not all(local)
    return [
        locate(model, revision=None if mixed and here else revision, offline=offline)
        for model, here in zip(models, local, strict=True)
    ]


def _as_json(evaluations: Mapping[str, Evaluation]) -> dict[str, Any]:
    """Of one model its evaluation; of several the same for each, by its label under `models`."""
    found = {
        label: {"weight_bytes": evaluation.weight_bytes, **evaluation.as_json()}
        for label, evaluation in evaluations.items()
    }
    return next(iter(found.values())) if len(found) == 1 else {"models": found}


def _draw(evaluations: Mapping[str, Evaluation], path: Path) -> None:
    from apertus_mlx.cli.plot import Series, save_plot

    series = [
        Series(label, [evaluation.weight_bytes / 1e6], [evaluation.overall.kl_mean])
        for label, evaluation in evaluations.items()
    ]
    floor = next(iter(evaluations.values())).overall_floor.kl_mean
    sizes = [line.x[0] for line in series]
    series.append(Series("noise floor", [min(sizes), max(sizes)], [floor, floor]))
    save_plot(path, series, "weights, MB", "mean KL divergence, nats", "Damage by size", log_y=True)


def _rows(evaluation: Evaluation) -> Iterator[list[str]]:
    for language, (divergence, floor) in evaluation.languages.items():
        yield _row(language, divergence, floor)
    yield _row("all", evaluation.overall, evaluation.overall_floor)


def _row(label: str, divergence: Divergence, floor: Divergence) -> list[str]:
    return [
        label,
        str(divergence.tokens),
        *(
            f"{value:.5f}"
            for value in (divergence.kl_mean, divergence.kl_median, divergence.kl_p90)
        ),
        "-" if divergence.kl_confident is None else f"{divergence.kl_confident:.5f}",
        f"{floor.kl_mean:.1e}",
        f"{divergence.top1_agreement:.2%}",
        "-" if divergence.perplexity is None else f"{divergence.perplexity:.3f}",
        "-"
        if divergence.perplexity_difference is None
        else f"{divergence.perplexity_difference:+.3f}",
    ]
