"""What `apertus-mlx eval --languages` shows: the worst, the median, and who loses most."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from apertus_mlx.cli.output import Table
from apertus_mlx.system.sizes import format_bytes

if TYPE_CHECKING:
    from apertus_mlx.convert.evaluation.evaluate import Evaluation
    from apertus_mlx.quant.metrics import Divergence

LANGUAGE_HEADER = (
    "model", "size", "language", "tokens", "tok/char", "KL mean", "±", "floor", "top-1",
)  # fmt: skip
# Languages that are shown of each model.
SHOWN = 10


def language_table(models: Mapping[str, Evaluation], per_character: Mapping[str, float]) -> Table:
    """Of each model the languages that lose most, worst first, the median and all together."""
    return Table(LANGUAGE_HEADER, list(_rows(models, per_character)))


def most_tokens(per_character: Mapping[str, float]) -> str:
    """A line that names the languages whose characters take most tokens."""
    ranked = sorted(per_character, key=lambda tag: -per_character[tag])[:SHOWN]
    return "most tokens a character: " + ", ".join(f"{t} {per_character[t]:.2f}" for t in ranked)


def tokens_read(in_texts: Mapping[str, int], most: int | None) -> str:
    """A line that says how much of the texts was read."""
    shortest, longest = (choose(in_texts, key=lambda tag: in_texts[tag]) for choose in (min, max))
    few, many, every = in_texts[shortest], in_texts[longest], sum(in_texts.values())
    has = f"{few:,} ({shortest}) to {many:,} ({longest}) tokens, {every:,} in all"
    if most is None or most >= many:
        return f"read: the whole text of each language, {has}"
    return f"read: at most {most:,} tokens of each language; a whole text has {has}"


def margin(found: Divergence) -> str:
    """The 95 % confidence interval of its mean, as a table has it."""
    return "-" if found.kl_margin is None else f"{found.kl_margin:.5f}"


def _rows(
    models: Mapping[str, Evaluation], per_character: Mapping[str, float]
) -> Iterator[list[str]]:
    from apertus_mlx.convert.evaluation.languages import rank

    for label, evaluation in models.items():
        losses = rank(evaluation.languages, per_character)
        own = [label, format_bytes(evaluation.weight_bytes)]
        for tag in losses.ranked[:SHOWN]:
            found, floor = evaluation.languages[tag]
            yield [
                *own,
                tag,
                str(found.tokens),
                f"{per_character[tag]:.2f}",
                f"{found.kl_mean:.5f}",
                margin(found),
                f"{floor.kl_mean:.1e}",
                f"{found.top1_agreement:.2%}",
            ]
        middle = [f"{losses.median_tokens_per_character:.2f}", f"{losses.median_kl:.5f}"]
        yield [*own, f"median of {len(losses.ranked)}", "", *middle, "", "", ""]
        every, floor = evaluation.overall, evaluation.overall_floor
        yield [
            *own,
            "all",
            str(every.tokens),
            "",
            f"{every.kl_mean:.5f}",
            margin(every),
            f"{floor.kl_mean:.1e}",
            f"{every.top1_agreement:.2%}",
        ]
