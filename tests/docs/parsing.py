"""Whether a command could be run: its program is known, its options are there. Runs nothing."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any, NoReturn
from unittest.mock import patch

import typer

from apertus_mlx.cli.app import app
from tests.docs.pages import pipelines
from tests.house.test_house import ROOT

# Programs of others; what stands behind them is theirs.
OTHERS = {
    *(".", "asciinema", "cat", "cd", "curl", "docker", "echo", "export", "git", "head", "hf", "jq"),
    *("llm", "mkdir", "pre-commit", "printf", "swift", "wc", "xcodebuild"),
}
# Words that stand for a number; all others are taken as names.
NUMBERS = {"N": "4", "S": "60", "MIB": "100"}


class _ParsedError(Exception):
    """The arguments are right; there is nothing to run."""


def check_line(line: str) -> None:
    """Raise for a line that names an unknown program, option, module or extra."""
    for stages in pipelines(line):
        for words in stages:
            check(_without_redirections(words))


def check(words: Sequence[str]) -> None:
    """Raise for a command that could not be run as it stands."""
    program, *arguments = words
    arguments = [NUMBERS.get(each, each) for each in arguments if each not in ("...", "…")]
    name = PurePath(program).name
    if name == "apertus-mlx":
        check_own(arguments)
    elif name in ("python", "python3"):
        _check_python(arguments)
    elif name == "pip":
        _check_pip(arguments)
    elif name == "pytest":
        assert all((ROOT / each).exists() for each in arguments if each.startswith("tests/"))
    elif name == "mlx.launch":
        check(arguments[arguments.index("--") + 1 :])
    elif name.startswith("mlx_lm."):
        assert importlib.util.find_spec(name) or importlib.util.find_spec("mlx_lm") is None
    elif program not in OTHERS and "=" not in program:
        raise AssertionError(f"{program}: the tests do not know this program")


def check_own(arguments: Sequence[str]) -> None:
    """Have typer read the arguments of `apertus-mlx`."""
    group: Any = typer.main.get_command(app)
    try:
        context = group.make_context("apertus-mlx", list(arguments))
        name, command, rest = group.resolve_command(context, list(arguments))
        command.make_context(name, list(rest), parent=context)
    except typer.Exit:
        pass  # --help and --version


def _check_python(arguments: Sequence[str]) -> None:
    if arguments[0] != "-m":
        return  # a file of the page's, or a line of code
    module, *rest = arguments[1:]
    spec = importlib.util.find_spec(module)
    assert spec is not None, f"python -m {module}: there is no such module"
    if not module.startswith("benchmarks."):
        return
    if spec.submodule_search_locations:
        module += ".__main__"
    main = importlib.import_module(module)
    assert main.__file__ is not None
    if "ArgumentParser" in Path(main.__file__).read_text("utf-8"):
        _check_argparse(main, rest)


def _check_argparse(module: Any, arguments: Sequence[str]) -> None:
    parse = argparse.ArgumentParser.parse_args

    def parse_only(self: Any, *_: Any) -> NoReturn:
        parse(self, list(arguments))
        raise _ParsedError

    with patch.object(argparse.ArgumentParser, "parse_args", parse_only):
        try:
            module.main()
        except _ParsedError:
            return
        except SystemExit as refused:
            raise AssertionError(f"{module.__name__} {arguments}: refused") from refused
    raise AssertionError(f"{module.__name__}: reads no arguments")


def _check_pip(arguments: Sequence[str]) -> None:
    """What is installed is this checkout, with extras that there are, or a package of others."""
    options = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert arguments[0] in ("install", "uninstall"), arguments
    for target in (each for each in arguments[1:] if not each.startswith("-")):
        found = re.fullmatch(r"([\w./-]+?)(?:\[([\w,-]+)\])?", target)
        assert found is not None, target
        assert found[1] != options["name"], f"pip install {target}: no index has it yet"
        if found[1] == ".":
            extras = set(found[2].split(",")) if found[2] else set()
            assert extras <= set(options["optional-dependencies"]), target


def _without_redirections(words: Sequence[str]) -> list[str]:
    kept, is_target = [], False
    for word in words:
        if not is_target and word not in ("<", ">", ">>", "&", ";"):
            kept.append(word)
        is_target = word in ("<", ">", ">>")
    return kept
