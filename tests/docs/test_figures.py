"""Figures in README and docs name what computed them, and those of README stand in docs."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest

from benchmarks import released_models
from benchmarks.draw_quantizers import LINES, measured
from tests.docs.pages import GENERATED, PAGES, read
from tests.house.test_house import ROOT

COMMAND = re.compile(r"python -m\s+(?:benchmarks|tests)\.[\w.]+|pytest |apertus-mlx \w+")
DATE = re.compile(r"\b20\d\d-\d\d-\d\d\b")
MACHINE = re.compile(r"Linux x86-64|M\d( Pro| Max| Ultra)?,? \d+ GB")
# A measurement: a fraction, or a number with a unit that is measured.
FIGURE = re.compile(r"\d\.\d|\d ?(?:MB|GB|ms|s|%|tokens/s)\b|\de-\d")
TABLE = re.compile(r"(?:^\|.*\n)+", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Figures:
    """A table of figures, and the words around it: of its section, and of the page's beginning."""

    table: str
    words: str


def figures(page: str) -> Iterator[Figures]:
    """The tables of a page that hold measurements; one between marks is compared as a whole."""
    text = re.sub(r"<!-- table: begin -->.*?<!-- table: end -->", "", read(page), flags=re.DOTALL)
    sections = re.split(r"^#+ ", text, flags=re.MULTILINE)
    beginning = "" if page == "README.md" else sections[1]
    for section in sections:
        words = TABLE.sub("", beginning + section)
        for found in TABLE.finditer(section):
            rows = [cells(line) for line in found[0].splitlines()[2:]]
            measured = [any(FIGURE.search(cell) for cell in row[1:]) for row in rows]
            if sum(measured) > len(rows) / 2:
                yield Figures(found[0], words)


def cells(line: str) -> list[str]:
    return [cell.strip(" *") for cell in line.strip().strip("|").split("|")]


@pytest.mark.parametrize("page", [page for page in PAGES if page not in GENERATED])
def test_a_table_of_figures_says_what_computed_it(page: str) -> None:
    for found in figures(page):
        whole = found.words + found.table
        named = COMMAND.search(whole), DATE.search(whole), MACHINE.search(whole)
        assert all(named), f"{page}: command, date or machine is missing\n{found.table}"


def test_readme_has_the_figures_of_docs() -> None:
    """Each figure of README's own table stands in a page of docs that names the same command."""
    [table] = [found.table for found in figures("README.md") if "computed by" in found.table]
    docs = [read(page) for page in PAGES if page.startswith("docs/")]
    rows = [cells(line) for line in table.splitlines()[2:]]
    assert len(rows) > 4
    for what, here, elsewhere, command in rows:
        module = command.strip("`").split()[2]
        numbers = re.findall(r"(?<![\w.])\d[\d,.]*(?:e-\d+)?(?!\w)", f"{here} {elsewhere}")
        pages = [page for page in docs if module in " ".join(page.split())]
        assert numbers and any(
            all(re.search(rf"(?<![\d.]){re.escape(n.rstrip(','))}(?!\d)", page) for n in numbers)
            for page in pages
        ), (what, numbers)


def test_readme_has_the_table_of_released_models() -> None:
    text = read("README.md")
    begin, end = "<!-- table: begin -->\n", "<!-- table: end -->\n"
    assert text[text.index(begin) + len(begin) : text.index(end)].splitlines() == list(
        released_models.table()
    )


def test_the_picture_shows_the_table() -> None:
    """Points lie where the figures of the table put them, whatever the axes."""
    svg = "{http://www.w3.org/2000/svg}"
    root = ET.fromstring((ROOT / "docs" / "quantizers.svg").read_text("utf-8"))  # noqa: S314
    expected = list(measured(read("docs/quantizers.md")).values())
    assert len(expected) == len(LINES) and all(len(points) == 4 for points in expected)
    drawn = []
    for group in root.iter(f"{svg}g"):
        # Points of a line, in order of drawing; ticks are `use` as well, below `xtick` and `ytick`.
        if (group.get("id") or "").startswith("line2d"):
            uses = [(float(u.get("x", 0)), float(u.get("y", 0))) for u in group.iter(f"{svg}use")]
            if len(uses) == len(expected[0]):
                drawn.append(uses)
    assert len(drawn) == len(expected)
    x, y = np.array(drawn).reshape(-1, 2).T
    size, kl = np.array(expected).reshape(-1, 2).T
    for at, value in ((x, size), (y, np.log10(kl))):
        slope, start = np.polyfit(value, at, 1)
        assert np.abs(slope * value + start - at).max() < 0.5
        assert abs(slope * np.ptp(value)) > 50


def test_readme_is_short() -> None:
    assert len(read("README.md").splitlines()) <= 200
