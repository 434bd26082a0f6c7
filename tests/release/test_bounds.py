"""Where a library's insides are used, it has an upper bound, and a comment says what is used."""

from __future__ import annotations

import ast
import re
import tomllib
from importlib.metadata import version
from itertools import chain

import pytest
from packaging.requirements import Requirement

from tests.house.test_house import MODULES, ROOT

# Of each library what it does not promise to keep, and what we import of that.
INSIDES = {
    "huggingface_hub": (
        "huggingface_hub.file_download.http_get",
        "huggingface_hub.utils.WeakFileLock",
        "huggingface_hub.utils.tqdm.*",
    ),
    "jinja2": ("jinja2.nodes", "jinja2.visitor.NodeTransformer"),
    "typer": ("typer.core.TyperCommand", "typer.core.TyperGroup"),
    "uvicorn": ("uvicorn.protocols.http.h11_impl.H11Protocol",),
    "llguidance": (),
    "h11": (),
}
# Of Python's own; which versions run the tests says CI.
OF_PYTHON = {"re._parser"}


def requirements() -> dict[str, list[Requirement]]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    texts = [*project["dependencies"], *chain(*project["optional-dependencies"].values())]
    found: dict[str, list[Requirement]] = {}
    for text in texts:
        found.setdefault(Requirement(text).name, []).append(Requirement(text))
    return found


def imported() -> set[str]:
    """`module.name` of all that the package imports."""
    names = set()
    for path in MODULES.values():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


IMPORTED = imported()


@pytest.mark.parametrize("library", INSIDES)
def test_a_library_whose_insides_are_used_has_an_upper_bound(library: str) -> None:
    for inside in INSIDES[library]:
        pattern = re.escape(inside).replace(r"\*", r"\w+")
        assert any(re.fullmatch(pattern, name) for name in IMPORTED), f"{inside}: no longer used"
    for requirement in requirements()[library]:
        assert any(each.operator in ("<", "<=", "==", "~=") for each in requirement.specifier)
        # What the tests run with is inside.
        assert requirement.specifier.contains(version(library), prereleases=True)


def test_no_other_private_names_are_imported() -> None:
    private = {name for name in IMPORTED if re.search(r"(^|\.)_[a-z]", name)}
    ours = {name for name in private if name.startswith(("apertus_mlx", "__future__"))}
    assert private - ours == OF_PYTHON
