"""docs/commands.md is written from the commands: `python -m tests.cli.test_commands_page write`."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from types import NoneType
from typing import Any, get_args, get_origin

import pytest
import typer

from apertus_mlx.cli.app import COMMANDS, app
from apertus_mlx.cli.options import spread
from tests.house.test_house import ROOT

PAGE = ROOT / "docs" / "commands.md"
HEAD = """# All commands and options

What `apertus-mlx COMMAND --help` says, on one page. It is written from the commands themselves.
Every command also takes `-h` and `--help`. Data goes to stdout, everything else to stderr;
[exit-codes.md](exit-codes.md) says how a command can end.
"""


def parameters(command: str) -> list[inspect.Parameter]:
    module = import_module(f"apertus_mlx.cli.{command}")
    function = spread(getattr(module, "evaluate" if command == "eval" else command))
    return list(inspect.signature(function).parameters.values())


def info(parameter: inspect.Parameter) -> Any:
    """What typer is told of a parameter."""
    return get_args(parameter.annotation)[1]


def flags(parameter: inspect.Parameter) -> list[str]:
    """`--out`, then other forms, as `--no-out` and `-o`; nothing for an argument."""
    if isinstance(info(parameter), typer.models.ArgumentInfo):
        return []
    # What stands first in an annotation is the first flag to typer, whatever it calls it.
    declared = [info(parameter).default, *info(parameter).param_decls]
    return [flag for each in declared for flag in each.split("/")]


def takes(parameter: inspect.Parameter) -> str:
    """How the value of an option is written; nothing where it takes none."""
    kinds = [each for each in get_args(get_args(parameter.annotation)[0]) if each is not NoneType]
    kind = kinds[0] if kinds else get_args(parameter.annotation)[0]
    if get_origin(kind) is list:
        kind = get_args(kind)[0]
    if kind is bool:
        return ""
    if info(parameter).metavar:
        return str(info(parameter).metavar)
    if hasattr(kind, "__members__"):
        return "|".join(each.value for each in kind)
    names = {"int": "N", "float": "X", "str": "TEXT", "Path": "PATH"}
    return names.get(kind.__name__, kind.__name__.upper())


def option_line(parameter: inspect.Parameter) -> str:
    value = takes(parameter)
    shown = ", ".join(f"`{flag} {value}`" if value else f"`{flag}`" for flag in flags(parameter))
    default = parameter.default
    said = info(parameter).help
    if not isinstance(default, bool | NoneType):
        said += f" Default: {getattr(default, 'value', default)}."
    return f"- {shown}: {said}"


def section(command: str) -> Iterator[str]:
    module = import_module(f"apertus_mlx.cli.{command}")
    function = getattr(module, "evaluate" if command == "eval" else command)
    found = parameters(command)
    arguments = [each for each in found if not flags(each)]
    options = [each for each in found if each not in arguments]
    usage = [each.name.upper() for each in arguments]
    usage = [
        name if each.default is each.empty else f"[{name}]"
        for name, each in zip(usage, arguments, strict=True)
    ]
    yield f"\n## {command}\n"
    yield f"```\n{' '.join(['apertus-mlx', command, '[OPTIONS]', *usage])}\n```\n"
    yield inspect.getdoc(function) + "\n"  # type: ignore[operator]
    yield from (f"- `{each.name.upper()}`: {info(each).help}" for each in arguments)
    yield from map(option_line, options)


def page() -> str:
    return HEAD + "\n".join(line for command in COMMANDS for line in section(command)) + "\n"


def test_the_page_is_what_the_commands_say() -> None:
    assert PAGE.read_text("utf-8") == page()


@pytest.mark.parametrize("command", COMMANDS)
def test_the_page_has_what_help_shows(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Compared with typer's own text, which knows nothing of this page."""
    app([command, "--help"], standalone_mode=False)
    shown = capsys.readouterr().out
    part = PAGE.read_text("utf-8").split(f"\n## {command}\n")[1].split("\n## ")[0]
    pattern = re.compile(r"(?<![\w-])--?[a-z][\w-]*")
    lines = [line for line in shown.partition("Options:")[2].splitlines() if line[2:3] == "-"]
    in_help = {flag for line in lines for flag in pattern.findall(line.split("  ")[1])}
    on_page = {
        flag
        for line in part.splitlines()
        if line.startswith("- `-")
        for flag in pattern.findall(line.partition(": ")[0])
    }
    assert in_help - {"-h", "--help"} == on_page


if __name__ == "__main__" and sys.argv[1:] == ["write"]:
    PAGE.write_text(page(), "utf-8")
