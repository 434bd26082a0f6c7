"""Links between pages lead somewhere; a nightly job asks the others' hosts."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote

import pytest

from tests.docs import external_links
from tests.docs.markdown import PAGES, anchors, links
from tests.house.test_house import ROOT

OUTSIDE = ("https://", "http://", "mailto:")


def broken(page: Path) -> list[str]:
    found = []
    for link in links(page):
        if link.startswith(OUTSIDE):
            continue
        name, _, anchor = unquote(link).partition("#")
        target = (page.parent / name).resolve() if name else page
        ours = target == page or target.is_relative_to(ROOT)
        if not (ours and target.exists() and (not anchor or anchor in anchors(target))):
            found.append(link)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page: Path) -> None:
    assert broken(page) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    other = ROOT / "docs" / "tools.md"
    page = tmp_path / "page.md"
    page.write_text(
        f"# One `two`: three\n# One\n# One\n[a](#one-two-three) [b](#one-1) [c](#one-2)\n"
        f"[d](none.md) [e]({other}#nowhere) ![f](none.svg)\n"
    )
    assert broken(page) == ["#one-2", "none.md", f"{other}#nowhere", "none.svg"]


def test_pages_of_the_site_link_to_pages_of_the_site() -> None:
    """The built site has nothing but docs/."""
    docs = ROOT / "docs"
    for page in docs.rglob("*.md"):
        for link in links(page):
            if not link.startswith((*OUTSIDE, "#")):
                target = (page.parent / link.partition("#")[0]).resolve()
                assert target.is_relative_to(docs), f"{page}: {link}"


def test_every_page_is_in_the_index() -> None:
    docs = ROOT / "docs"
    index = docs / "index.md"
    named = {(docs / link.partition("#")[0]).resolve() for link in links(index)}
    assert set(docs.rglob("*.md")) - {index} == {path for path in named if path.suffix == ".md"}


def test_links_to_others_are_told_apart() -> None:
    """What a nightly job asks; here the answers are made up."""
    answers: dict[str, int | str] = {"a": 200, "b": 404, "c": 403, "d": "ConnectError", "e": 429}
    assert external_links.broken(answers, answers.__getitem__) == ["b: 404", "d: ConnectError"]
    found = external_links.addresses()
    assert "https://github.com/ml-explore/mlx" in found
    assert not any("127.0.0.1" in each or "#" in each for each in found)
