"""docs/tools.md: its example runs as a reader would type it, and it names all that JSON has."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jsonschema
import pytest

from tests.docs.pages import read
from tests.docs.typing_in import read_page

PAGE = "docs/tools.md"


def test_the_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llguidance")
    _, answer, chat = read_page(PAGE, monkeypatch, tmp_path).printed
    report = json.loads(Path("asked.json").read_text())
    schema = json.loads(Path("tools.json").read_text())[0]["function"]["parameters"]
    for call in report["tool_calls"]:
        jsonschema.validate(json.loads(call["arguments"]), schema)
    roles = [message["role"] for message in json.loads(Path("messages.json").read_text())]
    assert roles == ["user", "assistant", *["tool"] * len(report["tool_calls"])]
    assert answer.strip() and re.match(r"get_weather \{.*\}\n", chat)
    assert [key for key in report if f"`{key}`" not in read(PAGE)] == []
