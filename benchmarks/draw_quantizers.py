"""README's picture: divergence against bytes, drawn from the table of docs/quantizers.md.

    python -m benchmarks.draw_quantizers [FILE]

The table holds what `benchmarks.quantizers` has measured, with its date and machine. FILE is
docs/quantizers.svg where none is named.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from apertus_mlx.cli.plot import Series, save_plot

DOCS = Path(__file__).resolve().parents[1] / "docs"
# What each line of the picture is called, and of which columns of the table it is the least.
LINES = {
    "mlx-lm, rounded": ("mlx-lm, rounded",),
    "mlx-lm's best": ("mlx-lm, rounded", "its GPTQ", "its DWQ"),
    "--method gptq": ("gptq",),
    "gptq, --target-size": ("gptq, `--target-size`",),
}
MODEL = "embedded"


def main() -> None:
    """Command line."""
    import matplotlib as mpl

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", nargs="?", type=Path, default=DOCS / "quantizers.svg")
    file = parser.parse_args().file
    series = [
        Series(label, [size / 1e6 for size, _ in points], [kl for _, kl in points])
        for label, points in measured((DOCS / "quantizers.md").read_text("utf-8")).items()
    ]
    # Letters stay letters, which makes the file a fifth; the same figures give the same ids.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": MODEL}):
        save_plot(
            file, series, "weights, MB", "mean KL divergence from bf16, nats",
            "What quantization costs: the embedded model (lower is better)", log_y=True,
        )  # fmt: skip


def measured(page: str) -> Mapping[str, list[tuple[int, float]]]:
    """Bytes and divergence by line, of the model's rows in the page's table."""
    found: dict[str, list[tuple[int, float]]] = {label: [] for label in LINES}
    for row in rows(page):
        size = int(row["bytes"].replace(",", ""))
        for label, columns in LINES.items():
            figures = [row[column] for column in columns]
            found[label].append((size, min(map(float, filter(_is_number, figures)))))
    return found


def _is_number(cell: str) -> bool:
    return re.fullmatch(r"[\d.]+", cell) is not None


def rows(page: str) -> Iterator[Mapping[str, str]]:
    """The rows of the model in the page's table, each cell by the name of its column."""
    lines = page[page.index("| model | bits | bytes |") :].split("\n\n")[0].splitlines()
    header, _, *body = ([cell.strip(" *") for cell in line.split("|")[1:-1]] for line in lines)
    model = ""
    for row in body:
        model = row[0] or model
        if model == MODEL:
            yield dict(zip(header, row, strict=True))


if __name__ == "__main__":
    main()
