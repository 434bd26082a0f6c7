"""What chat templates do with texts and numbers: operators, methods, formatting, printing.

What can make much from little is charged before it is done, and the rest after.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from types import BuiltinMethodType, NoneType
from typing import Any

import jinja2.sandbox
from jinja2.exceptions import SecurityError
from jinja2.runtime import Undefined

from apertus_mlx.text.template.budget import (
    MAX_INTEGER_BITS,
    STEP,
    LimitError,
    made,
    spend,
    weigh,
)
from apertus_mlx.text.template.marks import look_past

TEXT_METHODS = frozenset(
    """
    capitalize casefold count endswith find format format_map index isalnum isalpha isascii
    isdecimal isdigit islower isnumeric isspace istitle isupper join lower lstrip partition
    removeprefix removesuffix replace rfind rindex rpartition rsplit rstrip split splitlines
    startswith strip swapcase title upper
    """.split()  # noqa: SIM905
)
_METHODS: Mapping[type, frozenset[str]] = {
    str: TEXT_METHODS,
    dict: frozenset(["copy", "get", "items", "keys", "values"]),
    list: frozenset(["count", "index"]),
    tuple: frozenset(["count", "index"]),
}


def iterate(value: Any, unpacks: bool = False, pass_units: int = 0) -> Iterator[Any]:
    """Yield the items of `value`, each charged, to a loop that may take them apart."""
    look_past(value, "a loop")
    for item in value:
        spend(STEP + pass_units)
        if unpacks:
            look_past(item, "a loop")
        yield item


def as_text(value: Any) -> str:
    """Return `value` as a template prints it."""
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple | dict):
        spend(10 * weigh(value, "printing a list"))
    elif not isinstance(value, bool | int | float | NoneType | Undefined):
        raise LimitError(f"it prints a {type(value).__name__}")
    return str(value)


def join(separator: str, texts: Iterable[str], /) -> str:
    """Return `separator.join(texts)`."""
    texts = list(texts)
    widest = 1 if all(map(str.isascii, (separator, *texts))) else 4
    spend(STEP + widest * (sum(map(len, texts)) + len(separator) * len(texts)))
    return separator.join(texts)


def replace(text: str, old: Any, new: Any, count: Any = None, /) -> str:
    """Return `text.replace(old, new, count)`."""
    old, new = as_text(old), as_text(new)
    weigh((text, old), "replace")
    widest = 1 if text.isascii() and new.isascii() else 4
    spend(widest * (len(text) + text.count(old) * len(new)))
    return text.replace(old, new, -1 if count is None else count)


def percent(text: str, values: Any) -> str:
    """Return `text % values`."""
    if re.search(r"%[^a-zA-Z%]*(\*|\d{4})", text):
        raise LimitError("it asks for a very wide field")
    only_moves = "%" not in re.sub("%[%s]", "", text)
    spend(text.count("%") * (1000 + 10 * weigh(values, None if only_moves else "formatting")))
    result: str = text % values
    return made(result)


class Formatter(jinja2.sandbox.SandboxedFormatter):
    """`str.format` in the sandbox."""

    def format_field(self, value: Any, format_spec: str) -> Any:
        """Format one field."""
        spend()
        if len(format_spec) > 64 or re.search(r"\d{4}", format_spec):
            raise LimitError("it asks for a very wide field")
        if not format_spec:
            return made(as_text(value))
        look_past(value, "formatting")
        return made(format(value, format_spec))

    def convert_field(self, value: Any, conversion: Any) -> Any:
        """Apply `!s`, `!r` or `!a`."""
        if conversion is None:
            return value
        spend(10 * weigh(value, "formatting"))
        as_text(value)
        return super().convert_field(value, conversion)


def call_method(method: BuiltinMethodType, args: Any, kwargs: Any, formatter: Formatter) -> Any:
    """Call the method of a text, list or dict, if it is one that templates have."""
    owner: Any = method.__self__
    name = method.__name__
    if name not in _METHODS.get(type(owner), ()):
        raise SecurityError(f"the method {name} of a {type(owner).__name__} may not be called")
    doing = f"the method {name}"
    if not isinstance(owner, str):
        weigh(args[:1] if name == "get" else args, doing)
        if name in ("count", "index"):
            weigh(owner, doing)
        return made(method(*args, **kwargs)) if name == "copy" else method(*args, **kwargs)
    if name == "format":
        return made(formatter.vformat(owner, args, kwargs))
    if name == "format_map":
        return made(formatter.vformat(owner, (), dict(*args)))
    if name == "join":
        return join(owner, *map(iterate, args), **kwargs)
    if name == "replace":
        return replace(owner, *args, **kwargs)
    only_moves = name in ("strip", "lstrip", "rstrip") and not args
    weigh((owner, args, kwargs), None if only_moves else doing)
    part = args[0] if args and isinstance(args[0], str) else ""
    if name in ("rfind", "rindex", "rpartition", "rsplit"):  # quadratic in CPython
        spend(len(owner) * len(part) >> 6)
    if name in ("split", "rsplit", "splitlines"):
        spend(80 * (owner.count(part) if part else len(owner) // 2))
    return made(method(*args, **kwargs))


def check_operator(operator: str, left: Any, right: Any) -> None:
    """Charge for `left operator right` where its result may be much larger than both."""
    if operator == "*":
        for sequence, count in ((left, right), (right, left)):
            if isinstance(sequence, str | list | tuple) and isinstance(count, int):
                spend(sys.getsizeof(sequence) * max(count, 1))
    elif operator == "**" and isinstance(right, int) and right > MAX_INTEGER_BITS:
        raise LimitError("it makes a very large number")
    else:
        spend()
