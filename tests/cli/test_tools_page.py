"""docs/tools.md: its example runs as a reader would type it, and it names all that JSON has."""

from __future__ import annotations

import json
import re
import shlex
from contextlib import redirect_stdout
from io import BytesIO, StringIO, TextIOWrapper
from pathlib import Path
from subprocess import run

import jsonschema
import pytest

from apertus_mlx.cli.app import app
from tests.house.test_house import ROOT

PAGE = (ROOT / "docs" / "tools.md").read_text(encoding="utf-8")
EXAMPLE = re.compile(r"^```(json|sh|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def typed(line: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a command of the page; returns what it prints."""
    before, _, line = line.rpartition(" | ")
    if before:
        given = run(["/bin/sh", "-c", before], capture_output=True, check=True).stdout
        monkeypatch.setattr("sys.stdin", TextIOWrapper(BytesIO(given)))
    words, _, target = line.partition(" > ")
    printed = StringIO()
    with redirect_stdout(printed):
        program, *arguments = shlex.split(words)
        assert program == "apertus-mlx" and app(arguments, standalone_mode=False) in (0, None)
    if target:
        Path(target).write_text(printed.getvalue(), encoding="utf-8")
    return printed.getvalue()


def test_the_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llguidance")
    monkeypatch.chdir(tmp_path)
    printed = []
    for kind, text in EXAMPLE.findall(PAGE):
        if kind == "json":
            Path("tools.json").write_text(text)
        elif kind == "python":
            exec(compile(text, "docs/tools.md", "exec"), {})  # noqa: S102
        else:
            printed.append(typed(text.strip(), monkeypatch))
    asked, answer, chat = printed
    report = json.loads(asked)
    schema = json.loads(Path("tools.json").read_text())[0]["function"]["parameters"]
    for call in report["tool_calls"]:
        jsonschema.validate(json.loads(call["arguments"]), schema)
    roles = [message["role"] for message in json.loads(Path("messages.json").read_text())]
    assert roles == ["user", "assistant", *["tool"] * len(report["tool_calls"])]
    assert answer.strip() and re.match(r"get_weather \{.*\}\n", chat)
    assert [key for key in report if f"`{key}`" not in PAGE] == []
