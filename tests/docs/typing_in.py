"""Runs a page in this process as a reader would type it, against a Hub of the tests'."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from io import BytesIO, StringIO, TextIOWrapper
from pathlib import Path, PurePath
from typing import Any
from unittest.mock import patch

from apertus_mlx.cli.app import app
from apertus_mlx.hub.demo import model_dir
from tests.docs.pages import Block, Shown, blocks, pipelines, read, shown
from tests.docs.parsing import check, check_line
from tests.hub_server import point_client_at, serving

# These run until they are stopped, or measure a machine.
ONLY_PARSED = {"serve", "bench", "doctor"}
# Of the system: run in a process of their own.
SYSTEM = {"cat", "echo", "head", "jq", "printf", "wc"}
HUB_ID = re.compile(r"\b[\w-]+/Apertus-[\w.-]*\w")
# A time or a speed, with its unit.
TIMED = re.compile(r"\d[\d,.]*(?= ?(?:ms|s|min|minutes|seconds|tokens/s)\b)")


class _Heard(StringIO):
    """A stream that another hears as well, so that their order is kept."""

    def __init__(self, other: StringIO) -> None:
        super().__init__()
        self._other = other

    def write(self, text: str) -> int:
        self._other.write(text)
        return super().write(text)


def read_page(page: str, monkeypatch: Any, home: Path, *, at_night: bool = False) -> Reader:
    """Type all of a page in a new folder; returns the reader, whose current folder it stays."""
    text = read(page)
    found = list(blocks(text))
    reader = Reader(page, at_night=at_night)
    (home / "work").mkdir()
    monkeypatch.chdir(home / "work")
    for block in found:
        if block.file is not None:
            Path(block.file).write_text(block.text, "utf-8")
    # A Hub that knows each model that the page names, and gives the demonstration model for it.
    with serving() as hub:
        for repo_id in set(HUB_ID.findall(text)):
            hub.repository(repo_id).commit_folder(model_dir())
        point_client_at(hub.endpoint, home, monkeypatch)
        for block in found:
            reader.read(block)
    return reader


class Reader:
    """Types what a page shows, in the current folder."""

    def __init__(self, page: str, *, at_night: bool) -> None:
        self._page = page
        self._at_night = at_night
        self._names: dict[str, Any] = {}
        # What each line printed on stdout.
        self.printed: list[str] = []

    def read(self, block: Block) -> None:
        """Run a block, or only look whether it could run."""
        runs = block.mark is None or (block.mark == "nightly" and self._at_night)
        if block.file is not None:
            return
        if block.kind == "python":
            # Faults are told with the page's own lines.
            code = compile("\n" * block.line + block.text, self._page, "exec")
            if runs:
                exec(code, self._names)  # noqa: S102
        elif block.kind in ("sh", "console"):
            for each in shown(block):
                if runs:
                    self._type(each)
                else:
                    check_line(each.line)

    def _type(self, each: Shown) -> None:
        check_line(each.line)
        out, both = "", StringIO()
        is_complete = True
        for stages in pipelines(each.line):
            heard = each.typed
            for words in stages:
                ran = _run(words, heard, both)
                is_complete &= ran is not None
                heard = ran or ""
            out += heard
        self.printed.append(out)
        if each.output is not None and is_complete:
            told = f"{self._page}: {each.line}\nprinted:\n{out}\nwhere the page has:\n{each.output}"
            assert alike(each.output, out) or alike(each.output, both.getvalue()), told


def _run(words: Sequence[str], typed: str, both: StringIO) -> str | None:
    """What a command prints on stdout; None for one that is not run here."""
    target = words[-1] if words[-2:-1] == [">"] else None
    words = words[:-2] if target else words
    if words[-2:-1] == ["<"]:
        words, typed = words[:-2], Path(words[-1]).read_text("utf-8")
    name, arguments = PurePath(words[0]).name, list(words[1:])
    if name in SYSTEM:
        done = subprocess.run(words, input=typed, capture_output=True, text=True, check=True)
        printed = done.stdout
    elif name == "apertus-mlx" and arguments[:1] and arguments[0] not in ONLY_PARSED:
        printed = _run_own(arguments, typed, both)
    elif name == "python" and arguments[0].endswith(".py") and Path(arguments[0]).is_file():
        with redirect_stdout(_Heard(both)) as out:
            runpy.run_path(arguments[0], run_name="__main__")
        printed = out.getvalue()
    else:
        return check(words)
    if target is not None:
        Path(target).write_text(printed, "utf-8")
        printed = ""
    return printed


def _run_own(arguments: list[str], typed: str, both: StringIO) -> str:
    with (
        patch.object(sys, "stdin", TextIOWrapper(BytesIO(typed.encode()))),
        redirect_stdout(_Heard(both)) as out,
        redirect_stderr(_Heard(both)),
    ):
        code = app(arguments, standalone_mode=False)
    assert code in (0, None), (arguments, code, both.getvalue())
    return out.getvalue()


def alike(page: str, printed: str) -> bool:
    """Whether the page shows what was printed, but for times and speeds."""
    pattern = "".join(
        r"(?:.*\n)*?" if line == "..." else re.escape(TIMED.sub("0", line)) + r"\n"
        for line in page.splitlines()
    )
    lines = [TIMED.sub("0", line.rstrip()) for line in printed.splitlines()]
    return re.fullmatch(pattern, "".join(f"{line}\n" for line in lines)) is not None
