"""Every command and every Python example in README and docs runs, as a reader would type it.

What pages say that commands print is compared with what they print, but for times and speeds.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from apertus_mlx.hub.demo import model_dir
from tests.docs.pages import GENERATED, PAGES, blocks, mentioned, read
from tests.docs.parsing import check_line
from tests.docs.typing_in import Reader
from tests.hub_server import point_client_at, serving

HUB_ID = re.compile(r"\b[\w-]+/Apertus-[\w.-]*\w")
PLACES = [page for page in PAGES if page not in GENERATED]
NIGHTLY = [page for page in PLACES if any(block.mark == "nightly" for block in blocks(read(page)))]


def type_page(page: str, monkeypatch: pytest.MonkeyPatch, home: Path, *, at_night: bool) -> None:
    text = read(page)
    found = list(blocks(text))
    if not any(block.kind in ("sh", "console", "python") for block in found):
        return
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
        reader = Reader(page, at_night=at_night)
        for block in found:
            reader.read(block)


@pytest.mark.parametrize("page", PLACES)
def test_what_a_page_shows(page: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("mlx_lm")
    type_page(page, monkeypatch, tmp_path, at_night=False)


@pytest.mark.nightly
@pytest.mark.parametrize("page", NIGHTLY)
def test_what_takes_long(page: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    type_page(page, monkeypatch, tmp_path, at_night=True)


@pytest.mark.parametrize("page", PLACES)
def test_commands_in_sentences_have_these_options(page: str) -> None:
    for line in mentioned(read(page)):
        try:
            check_line(line)
        except Exception as error:
            raise AssertionError(f"{page}: `{line}`: {error}") from error


@pytest.mark.parametrize("page", PLACES)
def test_what_is_printed_stands_where_it_is_compared(page: str) -> None:
    """Only the recordings of `chat`, which are compared with a terminal, have a `$` elsewhere."""
    for block in blocks(read(page)):
        if page != "docs/chat.md":
            assert block.kind == "console" or not block.text.startswith("$ "), block
