"""The filters, tests, methods and globals that chat templates get.

An operation that can make much from little is charged before it runs; the others after.
"""

from __future__ import annotations

import datetime
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from types import NoneType
from typing import Any

import jinja2.filters
import jinja2.sandbox
import jinja2.tests
from jinja2.exceptions import SecurityError
from jinja2.runtime import Undefined
from jinja2.utils import Namespace

from apertus_mlx.text.template.budget import ITEM, STEP, LimitError, made, spend, weigh
from apertus_mlx.text.template.control_text import ControlText, concat

TEXT_METHODS = frozenset(
    """
    capitalize endswith join lower lstrip replace rstrip split startswith strip title upper
    """.split()  # noqa: SIM905
)
_METHODS: dict[type, Iterable[str]] = {
    str: TEXT_METHODS,
    ControlText: ControlText.METHODS,
    dict: ("get", "items", "keys", "values"),
}
# These look at no more than one item of a value.
_SHALLOW = ("count", "d", "default", "first", "get", "items", "keys", "last", "length", "values")
_CHOOSING = ("map", "reject", "rejectattr", "select", "selectattr")
_KINDS = ("boolean", "defined", "false", "float", "integer", "none", "number", "true", "undefined")
_COMPARISONS = (
    *("==", "eq", "equalto", "!=", "ne", "<", "lt", "lessthan", "<=", "le", "in"),
    *(">", "gt", "greaterthan", ">=", "ge"),
)


def as_text(value: Any) -> Any:
    """Return `value` as a template prints it: a `str` or `ControlText`."""
    if isinstance(value, str | ControlText):
        return value
    if isinstance(value, list | tuple | dict):
        spend(10 * weigh(value))
    elif not isinstance(value, bool | int | float | NoneType | Undefined):
        raise LimitError(f"it prints a {type(value).__name__}")
    return str(value)


def join(separator: Any, texts: Iterable[Any]) -> Any:
    """Return `separator.join(texts)`."""
    parts: list[Any] = []
    for text in texts:
        spend(STEP + sys.getsizeof(separator))
        parts += [separator, text]
    weigh(parts)
    return made(concat(parts[1:]))


def _operate(name: str, function: Any, value: Any, args: Any, kwargs: Any, first: Any = ()) -> Any:
    """Run a filter, test or method."""
    spend()
    units = weigh([*args, *kwargs.values()])
    if name not in _SHALLOW:
        value = list(value) if isinstance(value, Iterator) else value
        spend(weigh(value) * units >> 10)  # as for each character of each
    result = function(*first, value, *args, **kwargs)
    return iter(made(list(result))) if isinstance(result, Iterator) else made(result)


def call_method(method: Any, args: Any, kwargs: Any) -> Any:
    """Call the method of a text or dict, if it is one that templates have."""
    owner = getattr(method, "__self__", None)
    name = getattr(method, "__name__", "")
    if name not in _METHODS.get(type(owner), ()):
        raise SecurityError(f"{name or type(method).__name__} is not available to chat templates")
    functions = {"join": join, "replace": _replace, "split": _split}
    function = functions.get(name, getattr(type(owner), name))
    return _operate(name, function, owner, args, kwargs)


def _filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    needs = getattr(getattr(function, "jinja_pass_arg", None), "name", "nothing")

    @jinja2.pass_context
    def run(context: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        passed = {"context": (context,), "environment": (context.environment,)}
        return _operate(name, function, value, args, kwargs, passed.get(needs, ()))

    return run


def _test(name: str, function: Any) -> Callable[..., Any]:
    return lambda value, *args: _operate(name, function, value, args, {})


def _holds_for_texts(name: str) -> Callable[..., bool]:
    test: Any = jinja2.tests.TESTS[name]
    return lambda value: isinstance(value, ControlText) or test(value)


def _of_text(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda value, *args: function(str(as_text(value)), *args)


def _replace(value: Any, old: Any, new: Any, count: int = -1) -> str:
    text, old, new = (str(as_text(part)) for part in (value, old, new))
    widest = 1 if text.isascii() and new.isascii() else 4
    spend(widest * (len(text) + text.count(old) * len(new)))
    return text.replace(old, new, count)


def _split(text: str, separator: str | None = None, most: int = -1) -> list[str]:
    spend(ITEM * (text.count(separator) if separator else len(text) // 2))
    return text.split(separator, most)


@jinja2.pass_environment
def _join(environment: Any, value: Any, d: Any = "", attribute: Any = None) -> Any:
    if attribute is not None:
        value = map(jinja2.filters.make_attrgetter(environment, attribute), value)
    return join(as_text(d), map(as_text, value))


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    """Write JSON as transformers' filter of this name does: no HTML escapes, no ASCII escapes."""
    if not 0 <= (indent or 0) <= 16:
        raise LimitError("it asks for a very wide field")
    spend(weigh(value) * (6 + (indent or 0)))
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, default=ControlText.refuse)


def _raise_exception(message: Any) -> str:
    text = message.shown() if isinstance(message, ControlText) else as_text(message)
    raise jinja2.TemplateError(text[:300])


def _strftime_now(form: str) -> str:
    if len(form) > 64 or re.search(r"%[^a-zA-Z%]*\d", form):
        raise LimitError("it asks for a very wide field")
    return datetime.datetime.now().strftime(form)


GLOBALS: dict[str, Any] = {
    "range": jinja2.sandbox.safe_range,
    "namespace": lambda **names: Namespace(names),
    "raise_exception": _raise_exception,
    "strftime_now": _strftime_now,
}
_FILTERS: dict[str, Callable[..., Any]] = {
    **{name: jinja2.filters.FILTERS[name] for name in ("d", "default", "first", "items", "last")},
    **{name: jinja2.filters.FILTERS[name] for name in _CHOOSING},
    **{name: _of_text(getattr(str, name)) for name in ("capitalize", "lower", "upper")},
    "count": len,
    "join": _join,
    "length": len,
    "list": list,
    "replace": _replace,
    "safe": as_text,  # nothing is escaped
    "string": as_text,
    "title": _of_text(jinja2.filters.do_title),
    "tojson": _to_json,
    "trim": lambda value, *characters: as_text(value).strip(*characters),
}
FILTERS = {name: _filter(name, function) for name, function in _FILTERS.items()}
TESTS: dict[str, Any] = {
    **{name: jinja2.tests.TESTS[name] for name in ("mapping", *_KINDS)},
    **{name: _test(name, jinja2.tests.TESTS[name]) for name in _COMPARISONS},
    **{name: _holds_for_texts(name) for name in ("iterable", "sequence", "string")},
}
