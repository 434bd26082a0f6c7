"""docs/server.md has the table of fields that requests are checked by."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from apertus_mlx.server.fields import FIELDS, Field, fields_of
from apertus_mlx.server.message_fields import MESSAGE_FIELDS
from apertus_mlx.server.response_fields import RESPONSE_FIELDS

PAGE = Path(__file__).parents[2] / "docs/server.md"
TABLES = {
    "fields": FIELDS, "message fields": MESSAGE_FIELDS, "response fields": RESPONSE_FIELDS
}  # fmt: skip


def row(field: Field) -> str:
    """A field's line."""
    where = f" {' and '.join(field.endpoints)} |" if field in FIELDS else ""
    note = field.note
    if field.treatment == "refused" and field.harmless:
        allowed = ", ".join(f"`{json.dumps(each)}`" for each in field.harmless)
        note = "; ".join(filter(None, [note, f"but for {allowed}"]))
    takes = str(field.kind) if field.treatment == "honoured" else ""
    return f"| `{field.name}` |{where} {field.treatment} | {takes} | {note} |"


def table(fields: Sequence[Field]) -> str:
    head = ("| field | of | | takes | |", "|---|---|---|---|---|")
    if fields is not FIELDS:
        head = ("| field | | takes | |", "|---|---|---|---|")
    return "\n".join([*head, *map(row, fields)]) + "\n"


def around(page: str, name: str) -> tuple[str, str, str]:
    """A page before, in and behind the table of a name."""
    before, begin, rest = page.partition(f"<!-- {name}: begin -->\n")
    found, end, behind = rest.partition(f"<!-- {name}: end -->\n")
    assert begin and end
    return before + begin, found, end + behind


@pytest.mark.parametrize("name", TABLES)
def test_the_page_has_the_tables(name: str) -> None:
    assert around(PAGE.read_text("utf-8"), name)[1] == table(TABLES[name])


def test_no_field_is_treated_in_two_ways() -> None:
    for endpoint in ("chat", "completions"):
        names = [field.name for field in FIELDS if endpoint in field.endpoints]
        assert len(names) == len(set(names)) == len(fields_of(endpoint))
    for table in (MESSAGE_FIELDS, RESPONSE_FIELDS):
        names = [field.name for field in table]
        assert len(names) == len(set(names))


def test_the_page_has_all_paths() -> None:
    from apertus_mlx.server import app

    routes = re.findall(r'"(/[\w/.-]+)[{"]', Path(app.__file__).read_text("utf-8"))
    assert len(routes) > 8
    for path in routes:
        assert path.rstrip("/") in PAGE.read_text("utf-8"), path


if __name__ == "__main__" and sys.argv[1:] == ["write"]:
    for name, fields in TABLES.items():
        before, _, behind = around(PAGE.read_text("utf-8"), name)
        PAGE.write_text(before + table(fields) + behind)
