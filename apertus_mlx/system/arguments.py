"""What the functions of the package refuse to be called with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import UnionType
from typing import get_args

from apertus_mlx.errors import UsageError


def expect(kind: type | UnionType, **arguments: object) -> None:
    """Require a type of arguments, given by their names; `bool` is no `int` here.

    Raises:
        TypeError: one has another type; the message names it.
    """
    kinds = get_args(kind) or (kind,)
    for name, value in arguments.items():
        if not isinstance(value, kind) or (isinstance(value, bool) and bool not in kinds):
            names = [each.__name__.replace("NoneType", "None") for each in kinds]
            raise TypeError(f"{name}: expected {' or '.join(names)}, not {type(value).__name__}")


def expect_range(least: float, most: float, **arguments: float | None) -> None:
    """Require numbers from `least` to `most`; None is left alone.

    Raises:
        UsageError: one lies outside; the message names the option.
    """
    for name, value in arguments.items():
        if value is not None and not least <= value <= most:
            option = f"--{name.replace('_', '-')}"
            raise UsageError(f"{option} {value}: expected {least:,} to {most:,}")


def expect_one_of(allowed: Sequence[object], **arguments: object) -> None:
    """Require values among a few; None is left alone.

    Raises:
        UsageError: one is another; the message names the option and what it takes.
    """
    for name, value in arguments.items():
        if value is not None and value not in allowed:
            option = f"--{name.replace('_', '-')}"
            choices = ", ".join(map(str, allowed[:-1])) + f" or {allowed[-1]}"
            raise UsageError(f"{option} {repr(value)[:42]}: expected {choices}")


def expect_list(kind: type | UnionType, **arguments: object) -> list[object]:
    """Return one argument as a list; a single value of `kind` is a list of one, None an empty one.

    Raises:
        TypeError: it is no sequence, or something in it has another type.
    """
    ((name, value),) = arguments.items()
    if value is None:
        return []
    if isinstance(value, kind) or not isinstance(value, Sequence):
        value = [value]
    for each in value:
        expect(kind, **{name: each})
    return list(value)


def expect_paths(**arguments: object) -> list[Path]:
    """Return one argument, which holds names of files and folders, as a list of paths.

    Raises:
        TypeError: something in it is neither a path nor its text.
    """
    return [Path(str(each)) for each in expect_list(str | Path, **arguments)]
