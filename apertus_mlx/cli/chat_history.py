"""What was typed in chats before: a private file, whose faults are notes and never errors."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

from apertus_mlx.errors import ApertusError
from apertus_mlx.system.foreign_errors import explain
from apertus_mlx.system.model_files import read_own_file
from apertus_mlx.system.whole_file import whole_file

FILE_NAME = "chat-history.jsonl"
# What is kept when the file is cut, which happens at twice as many entries or bytes.
MAX_ENTRIES, MAX_BYTES = 1000, 4 * 2**20
# A longer text, such as a pasted book, is not kept.
MAX_ENTRY_BYTES = 2**16
# A file that is larger is none of ours.
MAX_FILE_BYTES = 64 * 2**20
PRIVATE_FILE, PRIVATE_FOLDER = 0o600, 0o700


class ChatHistory:
    """A file with one JSON text a line, the oldest first; `note` is told what is wrong with it.

    Nobody but its owner can read it. Several chats may add to it at the same time.
    """

    def __init__(self, path: Path, note: Callable[[str], None]) -> None:
        self._path = path
        self._note = note
        self._usable = True

    def read(self) -> list[str]:
        """All entries, the oldest first; none if the file cannot be used."""
        try:
            return self._read()
        except (OSError, ApertusError) as error:
            self._give_up(error)
            return []

    def add(self, text: str) -> None:
        """Keep `text` for the next chat."""
        line = _line(text)
        if not self._usable or len(line) > MAX_ENTRY_BYTES:
            return
        try:
            self._path.parent.mkdir(PRIVATE_FOLDER, parents=True, exist_ok=True)
            # One write of a whole line, which no other chat's can fall into.
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC
            file = os.open(self._path, flags, PRIVATE_FILE)
            try:
                os.fchmod(file, PRIVATE_FILE)
                os.write(file, line)
            finally:
                os.close(file)
        except OSError as error:
            self._give_up(error)

    def _read(self) -> list[str]:
        if not self._path.exists():
            return []
        data = read_own_file(self._path, MAX_FILE_BYTES)
        lines = data.splitlines()
        entries = [entry for line in lines if (entry := _entry(line)) is not None]
        if damaged := len(lines) - len(entries):
            left_out = "a line is" if damaged == 1 else f"{damaged} lines are"
            self._note(f"{self._path}: {left_out} damaged and left out of the history")
        if damaged or len(lines) > 2 * MAX_ENTRIES or len(data) > 2 * MAX_BYTES:
            entries = _newest(entries)
            with whole_file(self._path, durable=False) as new:
                new.chmod(PRIVATE_FILE)
                new.write_bytes(b"".join(map(_line, entries)))
        return entries[-MAX_ENTRIES:]

    def _give_up(self, error: Exception) -> None:
        self._usable = False
        self._note(f"{explain(error) or error}; the history of this chat is not kept")


def history_path() -> Path:
    """Where this user's history is: in the state folder, on a Mac in Application Support."""
    if sys.platform == "darwin":
        folder = Path.home() / "Library" / "Application Support"
    else:
        stated = os.environ.get("XDG_STATE_HOME", "")
        # By the XDG specification a relative one does not count.
        folder = Path(stated) if stated.startswith("/") else Path.home() / ".local" / "state"
    return folder / "apertus-mlx" / FILE_NAME


def _newest(entries: list[str]) -> list[str]:
    """The newest ones that `MAX_ENTRIES` and `MAX_BYTES` have room for."""
    sizes = accumulate(len(_line(entry)) for entry in reversed(entries[-MAX_ENTRIES:]))
    count = sum(size <= MAX_BYTES for size in sizes)
    return entries[len(entries) - count :]


def _line(text: str) -> bytes:
    return json.dumps(text).encode("ascii") + b"\n"


def _entry(line: bytes) -> str | None:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, str) else None
