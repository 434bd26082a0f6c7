"""docs/environment.md lists every variable of the environment that the package reads or sets."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from tests.docs.markdown import code_column
from tests.house.test_house import MODULES, ROOT

PAGE = ROOT / "docs" / "environment.md"


def mentions(tree: ast.AST) -> Iterator[ast.expr]:
    """The expressions that name variables: in `environ[x]`, `environ.f(x)`, `x in environ`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and is_environ(node.value):
            yield node.slice
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if is_environ(node.func.value) or node.func.attr == "getenv":
                yield node.args[0]
        elif isinstance(node, ast.Compare) and any(map(is_environ, node.comparators)):
            yield node.left


def is_environ(node: ast.expr) -> bool:
    return ast.unparse(node) in ("os.environ", "environ")


def loops(tree: ast.AST, expression: ast.expr) -> Iterator[str]:
    """NAMES, where the expression is in `for expression in NAMES` or `in NAMES.items()`."""
    for node in ast.walk(tree):
        clauses = [node] if isinstance(node, ast.For) else getattr(node, "generators", [])
        if clauses and expression in ast.walk(node):
            for clause in clauses:
                each = clause.target
                first = each.elts[0] if isinstance(each, ast.Tuple) else each
                if ast.unparse(first) == ast.unparse(expression):
                    yield ast.unparse(clause.iter).removesuffix(".items()")


def names_in(source: str, values: dict[str, object]) -> set[str]:
    """The variables that a module reads or sets.

    Args:
        source: its text.
        values: what its names stand for.
    """
    tree = ast.parse(source)
    found: set[str] = set()
    for expression in mentions(tree):
        if isinstance(expression, ast.Constant):
            found.add(str(expression.value))
            continue
        name = ast.unparse(expression)
        if isinstance(stated := values.get(name), str):
            found.add(stated)
            continue
        groups = [values[group] for group in loops(tree, expression)]
        assert groups, f"which variable is {name}?"
        for group in groups:
            assert isinstance(group, tuple | dict)
            found |= set(group)
    return found


def values_of(module: str, source: str) -> dict[str, object]:
    """What the names of a module stand for, those that functions import included."""
    values = dict(vars(import_module(module)))
    for node in ast.walk(ast.parse(source)):
        # Peers are imported where their packages are.
        if (
            isinstance(node, ast.ImportFrom)
            and node.module in MODULES
            and "peer" not in node.module
        ):
            home = vars(import_module(node.module))
            values |= {each.name: home.get(each.name) for each in node.names}
    return values


def test_the_page_lists_what_the_package_reads() -> None:
    found: set[str] = set()
    for name, path in MODULES.items():
        source = path.read_text("utf-8")
        if "environ" in source or "getenv" in source:
            found |= names_in(source, values_of(name, source))
    listed = code_column(PAGE, "Variables of this package")
    listed += code_column(PAGE, "Variables of the system and of libraries")
    assert sorted(listed) == sorted(found)


def test_the_page_lists_what_the_hub_client_reads() -> None:
    """Each name stands in the client's own source."""
    client = pytest.importorskip("huggingface_hub")
    source = "".join(path.read_text("utf-8") for path in Path(client.__file__).parent.rglob("*.py"))
    listed = code_column(PAGE, "Variables that only the Hub's client reads")
    assert listed and [name for name in listed if f'"{name}"' not in source] == []


def test_every_way_to_name_one_is_found() -> None:
    source = """
for name in NAMES: os.environ.get(name)
for name, value in LIMITS.items(): os.environ.setdefault(name, value)
{each: os.environ[each] for each in MORE if each in os.environ}
{each: version(each) for each in PACKAGES}
os.getenv("A"), os.environ["B"], "C" in os.environ, os.environ.get(D)
"""
    values = {"NAMES": ("E",), "LIMITS": {"F": "1"}, "MORE": ("G",), "PACKAGES": ("H",), "D": "D"}
    assert names_in(source, values) == set("ABCDEFG")
    with pytest.raises(AssertionError, match="which variable"):
        names_in("os.environ[unknown]", vars(sys))
