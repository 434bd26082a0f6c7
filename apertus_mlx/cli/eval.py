"""`apertus-mlx eval`: what a quantized model lost, against the model that it was made from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from apertus_mlx.cli.options import JsonOption, OfflineOption
from apertus_mlx.cli.output import layer_progress, note, print_data, print_json, print_table

if TYPE_CHECKING:
    from convert.receipt import Receipt
    from quant.metrics import Damage


# The name of the command; `eval` itself is Python's.
def evaluate(
    model: Annotated[str, typer.Argument(help="Model folder or Hub id.")],
    reference: Annotated[
        str, typer.Option("--reference", help="Model folder or Hub id that it should equal.")
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
    json: JsonOption = False,
    offline: OfflineOption = False,
) -> None:
    """Measure how far MODEL's predictions are from those of its reference."""
    from apertus_mlx.hub import locate
    from convert.calibration_text import read_texts
    from convert.receipt import FLOOR, measure

    texts = read_texts(text or [])
    folder = locate(model, revision=None, offline=offline)
    origin = locate(reference, revision=None, offline=offline)
    with layer_progress("measuring") as update:
        receipt = measure(folder, origin, texts, tokens, update)
    if json:
        print_json(receipt.as_json())
        return
    print_table(
        ["text", "tokens", "KL mean", "median", "p90", "confident", "floor", "top-1", "ppl", "+"],
        _rows(receipt),
    )
    print_data("")
    note(f"KL divergence in nats; floor: {FLOOR}")


def _rows(receipt: Receipt) -> list[list[str]]:
    rows = [
        _row(language, damage, floor) for language, (damage, floor) in receipt.languages.items()
    ]
    return [*rows, _row("all", receipt.overall, receipt.overall_floor)]


def _row(label: str, damage: Damage, floor: Damage) -> list[str]:
    return [
        label,
        str(damage.tokens),
        *(f"{value:.5f}" for value in (damage.kl_mean, damage.kl_median, damage.kl_p90)),
        "-" if damage.kl_confident is None else f"{damage.kl_confident:.5f}",
        f"{floor.kl_mean:.1e}",
        f"{damage.top1_agreement:.2%}",
        "-" if damage.perplexity is None else f"{damage.perplexity:.3f}",
        "-" if damage.perplexity_difference is None else f"{damage.perplexity_difference:+.3f}",
    ]
