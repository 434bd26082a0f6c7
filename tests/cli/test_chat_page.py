"""docs/chat.md shows what a terminal shows."""

from __future__ import annotations

import json
from pathlib import Path

import pyte
import pytest

from apertus_mlx.cli.chat_commands import COMMANDS
from benchmarks.record_chat import COLUMNS, RECORDINGS, ROWS, record
from tests.house.test_house import ROOT

PAGE = (ROOT / "docs" / "chat.md").read_text()


def test_the_page_names_every_command() -> None:
    assert [name for name in COMMANDS if f"`{name}" not in PAGE] == []


@pytest.mark.nightly
@pytest.mark.parametrize("name", RECORDINGS)
def test_a_recording_is_what_the_page_shows(name: str, tmp_path: Path) -> None:
    recording = record(name, tmp_path)
    assert f"{RECORDINGS[name].__doc__}:\n\n```\n{recording.text}\n```\n" in PAGE
    path = tmp_path / "cast"
    recording.write(path, "title")
    header, *events = map(json.loads, path.read_text().splitlines())
    assert header == {"version": 2, "width": COLUMNS, "height": ROWS, "title": "title"}
    times = [time for time, _, _ in events]
    assert times == sorted(times) and {kind for _, kind, _ in events} == {"o"}
    # What is played back ends as the terminal did.
    screen = pyte.Screen(COLUMNS, ROWS)
    pyte.Stream(screen).feed("".join(text for _, _, text in events))
    shown = [line.rstrip() for line in screen.display if line.strip()]
    assert shown[-1] == ">" and shown[-2] in recording.text
