"""The filters, tests, methods and globals that chat templates get.

Each is charged for what it goes through, and before it runs for what it makes beyond that.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
import sys
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from types import NoneType
from typing import Any

import jinja2.filters
import jinja2.sandbox
import jinja2.tests
from jinja2.runtime import Undefined
from jinja2.utils import Namespace

from apertus_mlx.text.template.budget import ITEM, STEP, LimitError, charged, spend, weigh

_NOW: ContextVar[datetime.datetime] = ContextVar("now")
_CHOOSING = ("map", "reject", "rejectattr", "select", "selectattr")
_KINDS = (
    *("boolean", "defined", "false", "float", "integer", "iterable", "mapping", "none", "number"),
    *("sequence", "string", "true", "undefined"),
)
_COMPARISONS = (
    *("==", "eq", "equalto", "!=", "ne", "<", "lt", "lessthan", "<=", "le", "in"),
    *(">", "gt", "greaterthan", ">=", "ge"),
)
_PRINTED = (str, bool, int, float, NoneType, Undefined, list, tuple, dict)


def as_text(value: Any) -> str:
    """Return `value` as a template prints it."""
    if not isinstance(value, _PRINTED):
        raise LimitError(f"it prints a {type(value).__name__}")
    spend(STEP if isinstance(value, str) else STEP + 10 * weigh(value))
    text = str(value)
    weigh(text)
    return text


def _priced(function: Callable[..., Any], free: int = 1) -> Callable[..., Any]:
    """Return a filter, test or method that charges for all its arguments but the `free` first."""
    first = free + hasattr(function, "jinja_pass_arg")  # Jinja adds an argument in front

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        spend(STEP + weigh(*args[first:], *kwargs.values()))
        return function(*args, **kwargs)

    return run


def _of_text(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(value: Any, *args: Any) -> Any:
        text = as_text(value)
        # As for each character of each.
        spend(sys.getsizeof(text) * sum(map(sys.getsizeof, args)) >> 10)
        return function(text, *args)

    return run


def _of_each(function: Any) -> Callable[..., Any]:
    @jinja2.pass_context
    def run(context: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        return function(context, charged(value or (), STEP), *args, **kwargs)

    return run


def _join(separator: str, texts: Iterable[str]) -> str:
    parts = list(charged(texts, STEP + sys.getsizeof(separator)))
    weigh(*parts)
    return separator.join(parts)


def _replace(text: str, old: Any, new: Any, count: int = -1) -> str:
    old, new = as_text(old), as_text(new)
    widest = 1 if text.isascii() and new.isascii() else 4
    spend(widest * (len(text) + text.count(old) * len(new)))
    return text.replace(old, new, count)


def _split(text: str, separator: str | None = None, most: int = -1) -> list[str]:
    spend(ITEM * (text.count(separator) if separator else len(text) // 2))
    return text.split(separator, most)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    """Write JSON as transformers' filter of this name does: no HTML escapes, no ASCII escapes."""
    if not 0 <= (indent or 0) <= 16:
        raise LimitError("it asks for a very wide field")
    spend(weigh(value) * (6 + (indent or 0)))
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _raise_exception(message: Any) -> str:
    raise jinja2.TemplateError(as_text(message)[:300])


# What `strftime_now` tells, if `fix_now` was called.
_fixed: list[datetime.datetime] = []


def fix_now() -> None:
    """Let templates of this process write the present date for ever.

    Prompts that begin with a date then begin alike tomorrow, too, so that caches stay of use.
    """
    _fixed[:] = [datetime.datetime.now()]


def _strftime_now(form: str) -> str:
    if len(form) > 64 or re.search(r"%[^a-zA-Z%]*\d", form):
        raise LimitError("it asks for a very wide field")
    return _NOW.get().strftime(form)


def set_clock() -> None:
    """Show templates in this thread the present time, and only this one until the next call.

    Renderings that are compared, of one prompt, would else differ by it.
    """
    _NOW.set(_fixed[0] if _fixed else datetime.datetime.now())


GLOBALS: dict[str, Any] = {
    "range": jinja2.sandbox.safe_range,
    "namespace": lambda **names: Namespace(names),
    "raise_exception": _raise_exception,
    "strftime_now": _strftime_now,
}
_TEXT: dict[str, Callable[..., Any]] = {
    name: _of_text(getattr(str, name))
    for name in (
        *("capitalize", "endswith", "lower", "lstrip", "rstrip", "startswith", "strip", "title"),
        "upper",
    )
} | {"replace": _of_text(_replace), "split": _of_text(_split)}
_FILTERS: dict[str, Callable[..., Any]] = {
    **{name: jinja2.filters.FILTERS[name] for name in ("d", "default", "first", "last")},
    **{name: _of_each(jinja2.filters.FILTERS[name]) for name in _CHOOSING},
    **{name: _TEXT[name] for name in ("capitalize", "lower", "replace", "upper")},
    "count": len,
    "items": lambda value: charged(jinja2.filters.do_items(value)),
    "join": lambda value, d="": _join(as_text(d), map(as_text, value)),
    "length": len,
    "list": lambda value: list(charged(value)),
    "safe": as_text,  # nothing is escaped
    "string": as_text,
    "title": _of_text(jinja2.filters.do_title),
    "tojson": _to_json,
    "trim": _TEXT["strip"],
}
_METHODS: dict[type, dict[str, Callable[..., Any]]] = {
    str: {**_TEXT, "join": _join},
    dict: {name: getattr(dict, name) for name in ("get", "items", "keys", "values")},
}
FILTERS = {name: _priced(function) for name, function in _FILTERS.items()}
_TESTS: dict[str, Any] = jinja2.tests.TESTS
TESTS = {
    **{name: _TESTS[name] for name in _KINDS},
    **{name: _priced(_TESTS[name], free=0) for name in _COMPARISONS},
}
METHODS = {
    owner: {name: _priced(function) for name, function in methods.items()}
    for owner, methods in _METHODS.items()
}
