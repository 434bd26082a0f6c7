"""Reads README and the pages of docs/ as a reader sees them: headings, links, tables."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

from tests.house.test_house import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
_MARKDOWN = MarkdownIt("commonmark").enable("table")


@cache
def tokens(path: Path) -> list[Token]:
    return _MARKDOWN.parse(path.read_text("utf-8"))


def links(path: Path) -> Iterator[str]:
    """Where the links and pictures of a page lead."""
    for token in tokens(path):
        for child in token.children or ():
            target = child.attrGet("href" if child.type == "link_open" else "src")
            if child.type in ("link_open", "image") and isinstance(target, str):
                yield target


def anchors(path: Path) -> set[str]:
    """The names of a page's headings in addresses, as GitHub makes them."""
    found: set[str] = set()
    before = None
    for token in tokens(path):
        if before is not None and before.type == "heading_open":
            text = "".join(
                child.content
                for child in token.children or ()
                if child.type in ("text", "code_inline")
            )
            name = re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")
            number = 0
            while (unique := f"{name}-{number}" if number else name) in found:
                number += 1
            found.add(unique)
        before = token
    return found


def code_column(path: Path, heading: str, column: int = 0) -> list[str]:
    """What stands in `code` in one column of all tables below a heading."""
    found, inside, at = [], False, 0
    every = tokens(path)
    for token, after in pairwise(every):
        if token.type == "heading_open":
            inside = after.content == heading
        elif token.type == "tr_open":
            at = -1
        elif token.type == "td_open":
            at += 1
            if inside and at == column:
                children = after.children or ()
                found += [child.content for child in children if child.type == "code_inline"]
    return found
