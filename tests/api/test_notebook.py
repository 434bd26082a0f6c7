"""The notebook runs from top to bottom and prints what it shows."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples" / "apertus.ipynb"


def without_figures(text: str) -> str:
    """A GPU rounds differently: the words must be the same, the last digits need not."""
    return re.sub(r"-?\d+\.\d+", "#", text)


@pytest.mark.nightly
def test_cells_print_what_the_notebook_shows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    for number, cell in enumerate(cell for cell in cells if cell["cell_type"] == "code"):
        exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)  # noqa: S102
        shown = "".join(line for output in cell["outputs"] for line in output["text"])
        printed, said = capsys.readouterr()
        assert without_figures(printed) == without_figures(shown)
        assert said == ""
