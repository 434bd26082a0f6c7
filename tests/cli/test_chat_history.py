"""The history of chats: private, kept whatever is typed, and never a reason to fail."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from apertus_mlx.cli import chat_history
from apertus_mlx.cli.chat_history import ChatHistory, history_path

TYPED = ["one", "two\nlines", "\x1b[31m", "half \udce9", "日本 🙂", ""]


@pytest.fixture
def notes() -> list[str]:
    return []


def test_what_is_typed_comes_back(tmp_path: Path, notes: list[str]) -> None:
    path = tmp_path / "state" / "history"
    before = os.umask(0)
    try:
        history = ChatHistory(path, notes.append)
        assert history.read() == []
        for text in TYPED:
            history.add(text)
    finally:
        os.umask(before)
    assert ChatHistory(path, notes.append).read() == TYPED
    assert [json.loads(line) for line in path.read_text().split("\n")[:-1]] == TYPED
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    # One that others could read is private after the next entry.
    path.chmod(0o644)
    history.add("more")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not notes


def test_it_does_not_grow_for_ever(
    tmp_path: Path, notes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_history, "MAX_ENTRIES", 3)
    path = tmp_path / "history"
    history = ChatHistory(path, notes.append)
    for number in range(7):
        history.add(str(number))
    assert len(path.read_text().splitlines()) == 7
    assert history.read() == ["4", "5", "6"]
    assert len(path.read_text().splitlines()) == 3
    # Nor by bytes: here one line of 10 and the line feed fit.
    monkeypatch.setattr(chat_history, "MAX_BYTES", 11)
    history.add("12345678")
    assert history.read() == ["12345678"]
    history.add("x" * chat_history.MAX_ENTRY_BYTES)
    assert history.read() == ["12345678"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]
    assert not notes


def test_damaged_lines_are_left_out(tmp_path: Path, notes: list[str]) -> None:
    path = tmp_path / "history"
    # The last line is one that a kill has cut.
    path.write_bytes(b'"one"\n\xff\xfe\n{"a": 1}\n"two"\n' + b"[" * 100_000 + b'\n"thr')
    assert ChatHistory(path, notes.append).read() == ["one", "two"]
    assert len(notes) == 1 and "4 lines are damaged" in notes[0] and str(path) in notes[0]
    history = ChatHistory(path, notes.append)
    history.add("four")
    assert history.read() == ["one", "two", "four"] and len(notes) == 1


def test_one_that_cannot_be_used_is_one_note(
    tmp_path: Path, notes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to(tmp_path / "away" / "file")
    with (tmp_path / "large").open("wb") as large:
        large.truncate(chat_history.MAX_FILE_BYTES + 1)
    for name in ("file/history", "folder", "fifo", "link", "large", "x" * 300):
        notes.clear()
        history = ChatHistory(tmp_path / name, notes.append)
        assert history.read() == []
        history.add("one")
        history.add("two")
        assert len(notes) == 1 and "is not kept" in notes[0], (name, notes)
        assert "bug" not in notes[0]
    # A disk that fills up later.
    notes.clear()
    history = ChatHistory(tmp_path / "kept", notes.append)
    history.add("one")
    monkeypatch.setattr(os, "write", _full)
    history.add("two")
    history.add("three")
    monkeypatch.undo()
    assert len(notes) == 1 and history.read() == ["one"]


def _full(*_: object) -> int:
    raise OSError(28, "No space left on device")


def test_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "apertus-mlx/chat-history.jsonl"
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setattr("sys.platform", "linux")
    for stated, folder in (
        ("/state", "/state"),
        ("", "/home/somebody/.local/state"),
        ("relative", "/home/somebody/.local/state"),
    ):
        monkeypatch.setenv("XDG_STATE_HOME", stated)
        assert history_path() == Path(folder) / name
    monkeypatch.setattr("sys.platform", "darwin")
    assert history_path() == Path("/home/somebody/Library/Application Support") / name
