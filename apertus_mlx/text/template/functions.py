"""The globals, filters and tests that chat templates get: what known templates use."""

from __future__ import annotations

import datetime
import json
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jinja2
import jinja2.filters
import jinja2.sandbox
import jinja2.tests
from jinja2.runtime import Context
from jinja2.utils import Namespace

from apertus_mlx.text.template.budget import LimitError, made, spend, weigh
from apertus_mlx.text.template.marks import look_past
from apertus_mlx.text.template.operations import as_text, iterate, join, percent, replace

# Jinja's own filters, by how they treat a value: they hand it on, look at it but not into it, go
# through its items, or go through all that is in it.
_MOVING = ("d", "default")
_LOOKING = ("count", "first", "last", "length")
_LISTING = ("items", "list", "map", "reject", "rejectattr", "reverse", "select", "selectattr")
_TEXT = ("capitalize", "lower", "title", "trim", "upper")
_DEEP = ("abs", "dictsort", "float", "int", "max", "min", "sort", "unique")
_CHEAP_TESTS = (
    *("boolean", "callable", "defined", "false", "float", "integer", "iterable", "mapping"),
    *("none", "number", "sequence", "string", "true", "undefined"),
)
_COMPARING_TESTS = (
    *("==", "eq", "equalto", "!=", "ne", "<", "lt", "lessthan", "<=", "le"),
    *(">", "gt", "greaterthan", ">=", "ge", "in", "sameas"),
)
_TEXT_TESTS = ("lower", "upper")
_NUMBER_TESTS = ("divisibleby", "even", "odd")


def _raise_exception(message: object) -> str:
    raise jinja2.TemplateError(f"it refuses the messages: {str(message)[:300]}")


def _strftime_now(form: str) -> str:
    if len(form) > 64 or re.search(r"%[^a-zA-Z%]*\d", form):
        raise LimitError("it asks for a very wide field")
    return datetime.datetime.now().strftime(form)


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    weigh((args, kwargs))
    result = dict(*args, **kwargs)
    weigh(list(result), "a key")
    return made(result)


def _namespace(*args: Any, **kwargs: Any) -> Namespace:
    return Namespace(_dict(*args, **kwargs))


def _charged(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return Jinja's filter `function`, charged."""
    doing = f"the filter {name}"
    pass_argument = getattr(function, "jinja_pass_arg", None)

    @jinja2.pass_context
    def run(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        spend()
        weigh((args, kwargs), None if name in _MOVING else doing)
        if name in _DEEP:
            value = list(value) if isinstance(value, Iterator) else value
            weigh(value, doing)
        elif name in _TEXT:
            value = as_text(value)
        elif name in _LISTING and hasattr(value, "__len__"):
            spend(64 * len(value))
        # A token's text has no blanks, so that cutting these off leaves it whole.
        if name not in _MOVING and not (name == "trim" and not args and not kwargs):
            look_past(value, doing)
        if pass_argument is not None:
            firsts = {"context": context, "environment": context.environment}
            args = (value, *args)
            value = firsts.get(pass_argument.name, context.eval_ctx)
        result = function(value, *args, **kwargs)
        return iter(made(list(result))) if isinstance(result, Iterator) else made(result)

    return run


@jinja2.pass_environment
def _join(environment: Any, value: Any, d: Any = "", attribute: Any = None) -> str:
    items = iterate(value)
    if attribute is not None:
        weigh(attribute, "the filter join")
        items = map(jinja2.filters.make_attrgetter(environment, attribute), items)
    return join(as_text(d), map(as_text, items))


def _replace(value: Any, old: Any, new: Any, count: Any = None) -> str:
    return replace(as_text(value), old, new, count)


def _indent(value: Any, width: Any = 4, first: bool = False, blank: bool = False) -> str:
    text = as_text(value)
    spend((len(width) if isinstance(width, str) else int(width)) * sys.getsizeof(text))
    return made(jinja2.filters.do_indent(text, width, first, blank))


def _format(value: Any, *args: Any, **kwargs: Any) -> str:
    return percent(as_text(value), kwargs or args)


@jinja2.pass_environment
def _sum(environment: Any, value: Any, attribute: Any = None) -> Any:
    value = list(value) if isinstance(value, Iterator) else value
    weigh((value, attribute), "the filter sum")
    return made(jinja2.filters.sync_do_sum(environment, value, attribute))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """Write JSON as transformers' filter of this name does: no HTML escapes, no ASCII escapes."""
    size = weigh((value, indent, separators), "the filter tojson")
    wide = len(indent) if isinstance(indent, str) else indent or 0
    spend(size * (6 + wide + len("".join(separators or ()))))
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _charged_test(name: str, function: Any) -> Callable[..., Any]:
    def run(value: Any, *args: Any) -> Any:
        spend()
        if name in _NUMBER_TESTS and not isinstance(value, int | float):
            raise TypeError(f"the test {name} is for numbers")
        if name in _TEXT_TESTS:
            value = as_text(value)
        if name not in _CHEAP_TESTS:
            weigh((value, args), f"the test {name}")
        return function(value, *args)

    return run


GLOBALS: dict[str, Any] = {
    "range": jinja2.sandbox.safe_range,
    "dict": _dict,
    "namespace": _namespace,
    "raise_exception": _raise_exception,
    "strftime_now": _strftime_now,
}
FILTERS: dict[str, Any] = {
    **{
        name: _charged(name, jinja2.filters.FILTERS[name])
        for name in (*_MOVING, *_LOOKING, *_LISTING, *_TEXT, *_DEEP)
    },
    "string": as_text,
    "join": _join,
    "replace": _replace,
    "indent": _indent,
    "format": _format,
    "sum": _sum,
    "tojson": _to_json,
}
TESTS: dict[str, Any] = {
    name: _charged_test(name, jinja2.tests.TESTS[name])
    for name in (*_CHEAP_TESTS, *_COMPARING_TESTS, *_TEXT_TESTS, *_NUMBER_TESTS)
}
