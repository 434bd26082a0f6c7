"""docs/server.md has the table of fields that requests are checked by."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from apertus_mlx.server.fields import FIELDS, Field, fields_of

PAGE = Path(__file__).parents[2] / "docs/server.md"
BEGIN, END = "<!-- fields: begin -->\n", "<!-- fields: end -->\n"


def row(field: Field) -> str:
    """A field's line."""
    where = " and ".join(field.endpoints)
    note = field.note
    if field.treatment == "refused" and field.harmless:
        allowed = ", ".join(f"`{json.dumps(each)}`" for each in field.harmless)
        note = "; ".join(filter(None, [note, f"but for {allowed}"]))
    takes = str(field.kind) if field.treatment == "honoured" else ""
    return f"| `{field.name}` | {where} | {field.treatment} | {takes} | {note} |"


def table() -> str:
    lines = ["| field | of | | takes | |", "|---|---|---|---|---|", *map(row, FIELDS)]
    return "\n".join(lines) + "\n"


def test_the_page_has_the_table() -> None:
    text = PAGE.read_text("utf-8")
    assert text[text.index(BEGIN) + len(BEGIN) : text.index(END)] == table()


def test_no_field_is_treated_in_two_ways() -> None:
    for endpoint in ("chat", "completions"):
        names = [field.name for field in FIELDS if endpoint in field.endpoints]
        assert len(names) == len(set(names)) == len(fields_of(endpoint))


def test_the_page_has_all_paths() -> None:
    from apertus_mlx.server import app

    routes = re.findall(r'"(/[\w/.-]+)[{"]', Path(app.__file__).read_text("utf-8"))
    assert len(routes) > 8
    for path in routes:
        assert path.rstrip("/") in PAGE.read_text("utf-8"), path


if __name__ == "__main__" and sys.argv[1:] == ["write"]:
    page = PAGE.read_text("utf-8")
    PAGE.write_text(page[: page.index(BEGIN) + len(BEGIN)] + table() + page[page.index(END) :])
