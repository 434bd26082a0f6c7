"""What the site is built from names every page, and every name of the API."""

from __future__ import annotations

import re
from importlib import import_module

import apertus_mlx
from tests.house.test_house import ROOT


def test_every_page_is_in_the_navigation() -> None:
    docs = ROOT / "docs"
    named = re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text("utf-8"), re.MULTILINE)
    assert sorted(named) == sorted(str(page.relative_to(docs)) for page in docs.rglob("*.md"))


def test_the_reference_has_all_that_the_package_offers() -> None:
    page = (ROOT / "docs" / "reference" / "api.md").read_text("utf-8")
    found = {}
    for module, members in re.findall(r"^::: (\S+)\n    options:\n.*\[(.*)\]", page, re.MULTILINE):
        found |= dict.fromkeys(members.split(", "), module)
    assert sorted(found) == sorted(set(apertus_mlx.__all__) - {"__version__"})
    for name, module in found.items():
        assert getattr(import_module(module), name) is getattr(apertus_mlx, name)
