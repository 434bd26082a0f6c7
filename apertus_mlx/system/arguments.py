"""What functions and commands take: said once, as `Annotated[type, Option(words)]`, and checked.

The arguments of a function and the fields of a dataclass are annotated alike. The command line
makes its options of these annotations; `checked` and `check_fields` refuse what they exclude.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, wraps
from os import PathLike
from pathlib import Path
from types import NoneType, SimpleNamespace, UnionType
from typing import Annotated, Any, Literal, ParamSpec, TypeVar, Union, cast, get_args, get_origin
from typing import get_type_hints as resolve

from apertus_mlx.errors import UsageError
from apertus_mlx.system.foreign_errors import own_errors

_P = ParamSpec("_P")
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Range:
    """The numbers from `least` to `most`, and 0 where that means off."""

    least: float
    most: float
    or_zero: bool = False

    def holds(self, value: float) -> bool:
        """Whether `value` is one of them; NaN never is."""
        return self.least <= value <= self.most or (self.or_zero and value == 0)

    def __str__(self) -> str:
        ends = [
            f"{end:,}" if isinstance(end, int) else f"{end:.2g}" for end in (self.least, self.most)
        ]
        return f"{'0 (off), or ' if self.or_zero else ''}{ends[0]} to {ends[1]}"


@dataclass(frozen=True, slots=True)
class Option:
    """What an argument is, beside its type: words for its reader, and the numbers it may be.

    `flags` are other names on the command line, with spaces between them; `metavar` is what its
    help writes for a value.
    """

    words: str
    range: Range | None = None
    flags: str = ""
    metavar: str | None = None


def find_option(hint: Any) -> Option | None:
    """The `Option` in an annotation."""
    found = (each for each in getattr(hint, "__metadata__", ()) if isinstance(each, Option))
    return next(found, None)


def kinds_of(hint: Any) -> list[Any]:
    """The types that an annotation allows, in its order."""
    if get_origin(hint) is Annotated:
        return kinds_of(get_args(hint)[0])
    if get_origin(hint) in (Union, UnionType):
        return [kind for part in get_args(hint) for kind in kinds_of(part)]
    return [hint]


@cache
def hints_of(target: Callable[..., object]) -> Mapping[str, Any]:
    """The annotations of a function's arguments by name or, of a dataclass, of its fields."""
    if inspect.isclass(target):
        return resolve(target, include_extras=True)
    function: Any = inspect.unwrap(target)
    named = {
        name: function.__annotations__[name]
        for name, parameter in inspect.signature(function).parameters.items()
        if name in function.__annotations__ and parameter.kind is not parameter.VAR_KEYWORD
    }
    found = SimpleNamespace(__annotations__=named)
    return resolve(found, function.__globals__, include_extras=True)


def checked(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Have a function refuse what its annotations exclude, see `expect`, and raise our errors."""

    @wraps(function)
    def run(*given: _P.args, **named: _P.kwargs) -> _T:
        hints = hints_of(function)
        for name, value in inspect.signature(function).bind(*given, **named).arguments.items():
            if name in hints:
                expect(hints[name], **{name: value})
        with own_errors():
            return function(*given, **named)

    return run


def check_fields(values: object, group: type | None = None) -> None:
    """Refuse fields of a dataclass that its annotations exclude, or those of `group`."""
    for name, hint in hints_of(group or type(values)).items():
        if hasattr(values, name):
            expect(hint, **{name: getattr(values, name)})


def expect(hint: Any, **arguments: object) -> None:
    """Require what an annotation says of arguments, given by their names; `bool` is no `int` here.

    Raises:
        TypeError: one has another type; the message begins with its name.
        UsageError: none of the values of a `Literal`, or beyond the range; the message names the
            option.
    """
    kinds, option = kinds_of(hint), find_option(hint)
    for name, value in arguments.items():
        found = next((kind for kind in kinds if _is(value, kind)), None)
        if found is None:
            expected = " or ".join(dict.fromkeys(map(_name, kinds)))
            raise TypeError(f"{name}: expected {expected}, not {type(value).__name__}")
        if value == "" and {Path, PathLike} & {get_origin(kind) or kind for kind in kinds}:
            raise UsageError(f"{_flag(name)}: is empty, and names no file, folder or model")
        if get_origin(found) is Sequence:
            for each in _elements(value):
                expect(get_args(found)[0], **{name: each})
        elif get_origin(found) is Literal:
            expect_one_of(get_args(found), **{name: value})
        elif (
            option
            and option.range
            and value is not None
            and not option.range.holds(cast(float, value))
        ):
            raise UsageError(f"{_flag(name)} {value}: expected {option.range}")


def known(group: type, given: _T) -> _T:
    """Keyword arguments; a TypeError names the first that is no field of a dataclass."""
    for name in cast(Mapping[str, object], given):
        if name not in hints_of(group):
            raise TypeError(f"{name}: no such option")
    return given


def expect_one_of(allowed: Sequence[object], **arguments: object) -> None:
    """Require values among a few; None is left alone.

    Raises:
        UsageError: one is another; the message names the option and what it takes.
    """
    for name, value in arguments.items():
        if value is not None and value not in allowed:
            choices = ", ".join(map(str, allowed[:-1])) + f" or {allowed[-1]}"
            raise UsageError(f"{_flag(name)} {repr(value)[:42]}: expected {choices}")


def as_list(value: object) -> list[Any]:
    """One or several values as a list; None is an empty one."""
    return [] if value is None else list(_elements(value))


def _elements(value: Any) -> Iterator[Any]:
    return iter(value if _is(value, Sequence) else [value])


def _is(value: object, kind: Any) -> bool:
    kind = str if get_origin(kind) is Literal else get_origin(kind) or kind
    if isinstance(value, bool):
        return kind is bool
    if kind is Sequence and isinstance(value, str | bytes):
        return False
    return isinstance(value, float | int if kind is float else kind)


def _name(kind: Any) -> str:
    kind = str if get_origin(kind) is Literal else get_origin(kind) or kind
    others = {NoneType: "None", Sequence: "list", Callable: "function"}
    return others.get(kind) or str(kind.__name__)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
