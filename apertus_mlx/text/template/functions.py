"""The globals, filters and tests that chat templates get, charged to the budget."""

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
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.utils import Namespace

from apertus_mlx.text.template.budget import (
    MAX_DEPTH,
    OBJECT_BYTES,
    POINTER_BYTES,
    Budget,
    LimitError,
    budget_of,
)
from apertus_mlx.text.template.marks import look_past
from apertus_mlx.text.template.text import (
    as_text,
    bounded,
    join_texts,
    percent_format,
    pieces_of_split,
    replace_text,
)

MAX_INDENT = 16
_CHEAP_TESTS = (
    *("boolean", "callable", "defined", "false", "float", "integer", "iterable", "mapping"),
    *("none", "number", "sequence", "string", "true", "undefined"),
)
_COMPARING_TESTS = (
    *("==", "eq", "equalto", "!=", "ne", "<", "lt", "lessthan", "<=", "le"),
    *(">", "gt", "greaterthan", ">=", "ge", "in", "lower", "sameas", "upper"),
)
# Filters that hand a text on whole, and those of lists that look at no text in them.
_MOVING = frozenset(["d", "default", "format", "indent", "string"])
_LAZY = ("map", "reject", "rejectattr", "select", "selectattr")
_TAKING_APART = frozenset(["items", "join", "list", "reverse"])
_NUMBER_TESTS = ("divisibleby", "even", "odd")


def _raise_exception(message: object) -> str:
    raise jinja2.TemplateError(f"it refuses the messages: {str(message)[:300]}")


def _strftime_now(form: str) -> str:
    if len(form) > 64 or re.search(r"%[^a-zA-Z%]*\d", form):
        raise LimitError("it asks for a very wide field")
    return datetime.datetime.now().strftime(form)


@jinja2.pass_context
def _dict(context: Context, *args: Any, **kwargs: Any) -> dict[Any, Any]:
    budget_of(context).weigh((args, kwargs))
    result = dict(*args, **kwargs)
    budget_of(context).weigh(list(result), "a key")
    budget_of(context).hold(OBJECT_BYTES + 4 * POINTER_BYTES * len(result))
    return result


@jinja2.pass_context
def _namespace(context: Context, *args: Any, **kwargs: Any) -> Namespace:
    names = dict(*args, **kwargs)
    budget_of(context).weigh(list(names), "a key")
    if any(str(name).startswith("_") for name in names):
        raise SecurityError("a namespace attribute that starts with _")
    budget_of(context).hold(4 * OBJECT_BYTES + 4 * POINTER_BYTES * len(names))
    return Namespace(names)


def _counted(budget: Budget, values: Iterator[Any]) -> Iterator[Any]:
    for value in values:
        budget.step()
        yield value


def _charged(name: str, function: Callable[..., Any], *, weighs: bool, context_first: bool) -> Any:
    """Return Jinja's filter `function` with its work charged to the budget."""
    doing = f"the filter {name}"

    @jinja2.pass_context
    def run(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        budget = budget_of(context)
        budget.step()
        budget.hold(OBJECT_BYTES)
        if isinstance(value, Iterator):
            value = _counted(budget, value)
            if weighs:
                value = list(value)
        # A token's text has no blanks, so that cutting these off leaves it whole.
        trims = name == "trim" and isinstance(value, str) and not args and not kwargs
        moves = name in _MOVING or trims
        if not moves:
            look_past(value, doing)
        if weighs or name in _LAZY:
            budget.weigh((args, kwargs), None if name == "join" else doing)
        if weighs:
            whole = not moves and name not in _TAKING_APART
            count, text_bytes = budget.weigh(value, doing if whole else None)
            budget.hold(3 * text_bytes + 2 * POINTER_BYTES * count)
        first: tuple[Any, ...] = (context,) if context_first else ()
        result = function(*first, value, *args, **kwargs)
        return _counted(budget, result) if isinstance(result, Iterator) else bounded(result)

    return run


def _with_environment(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(context: Context, *args: Any, **kwargs: Any) -> Any:
        return function(context.environment, *args, **kwargs)

    return run


def _list(value: Any) -> list[Any]:
    return list(value)


def _string(context: Context, value: Any) -> str:
    return as_text(budget_of(context), value)


def _join_filter(context: Context, value: Any, d: Any = "", attribute: Any = None) -> str:
    budget = budget_of(context)
    if attribute is not None:
        look_past(attribute, "the filter join")
        value = map(jinja2.filters.make_attrgetter(context.environment, attribute), value)
    return join_texts(budget, as_text(budget, d), [as_text(budget, item) for item in value])


def _replace_filter(context: Context, value: Any, old: Any, new: Any, count: Any = None) -> str:
    budget = budget_of(context)
    return replace_text(budget, as_text(budget, value), old, new, count)


def _indent(
    context: Context, value: Any, width: Any = 4, first: bool = False, blank: bool = False
) -> str:
    budget = budget_of(context)
    text = as_text(budget, value)
    if (len(width) if isinstance(width, str) else int(width)) > 64:
        raise LimitError("it indents very far")
    budget.hold(4 * 64 * pieces_of_split(text, "splitlines") + 2 * sys.getsizeof(text))
    return jinja2.filters.do_indent(text, width, first, blank)


def _format_filter(context: Context, value: Any, *args: Any, **kwargs: Any) -> str:
    budget = budget_of(context)
    return percent_format(budget, as_text(budget, value), kwargs or args)


def _sum(context: Context, value: Any, attribute: Any = None, start: Any = 0) -> Any:
    if not isinstance(start, int | float):
        raise TypeError("can only sum numbers")
    return jinja2.filters.sync_do_sum(context.environment, value, attribute, start)


def _to_json(
    context: Context,
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """Write JSON as transformers' filter of this name does: no HTML escapes, no ASCII escapes."""
    budget = budget_of(context)
    count, text_bytes = budget.weigh((value, indent, separators), "the filter tojson")
    wide = len(indent) if isinstance(indent, str) else indent or 0
    if wide > MAX_INDENT or (separators and len("".join(separators)) > MAX_INDENT):
        raise LimitError("it indents very far")
    each = 80 if indent is None else 80 + wide * MAX_DEPTH
    budget.hold(6 * text_bytes + each * count)
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _build_filters() -> dict[str, Any]:
    standard: dict[str, Any] = dict(jinja2.filters.FILTERS)
    filters: dict[str, Any] = {}

    def add(name: str, function: Any, *, weighs: bool, context_first: bool) -> None:
        filters[name] = _charged(name, function, weighs=weighs, context_first=context_first)

    for name in ("default", "d", "items", "length", "count"):
        add(name, standard[name], weighs=False, context_first=False)
    for name in (
        *("abs", "capitalize", "dictsort", "float", "int", "lower", "reverse", "title", "trim"),
        "upper",
    ):
        add(name, standard[name], weighs=True, context_first=False)
    add("list", _list, weighs=True, context_first=False)
    for name in ("sort", "unique", "min", "max"):
        add(name, _with_environment(standard[name]), weighs=True, context_first=True)
    first: Any = jinja2.filters.sync_do_first
    last: Any = jinja2.filters.do_last
    add("first", _with_environment(first), weighs=False, context_first=True)
    add("last", _with_environment(last), weighs=False, context_first=True)
    for name in _LAZY:
        add(name, getattr(jinja2.filters, f"sync_do_{name}"), weighs=False, context_first=True)
    ours: dict[str, Any] = {
        "string": _string,
        "join": _join_filter,
        "replace": _replace_filter,
        "indent": _indent,
        "format": _format_filter,
        "sum": _sum,
        "tojson": _to_json,
    }
    for name, function in ours.items():
        add(name, function, weighs=name in ("join", "sum"), context_first=True)
    return filters


def _build_tests() -> dict[str, Any]:
    def charged(name: str) -> Any:
        function: Any = jinja2.tests.TESTS[name]

        @jinja2.pass_context
        def run(context: Context, value: Any, *args: Any) -> Any:
            budget = budget_of(context)
            budget.step()
            if name in _NUMBER_TESTS and not isinstance(value, int | float):
                raise TypeError(f"the test {name} is for numbers")
            if name in _COMPARING_TESTS:
                budget.weigh((value, args), f"the test {name}")
            return function(value, *args)

        return run

    return {name: charged(name) for name in (*_CHEAP_TESTS, *_COMPARING_TESTS, *_NUMBER_TESTS)}


GLOBALS: dict[str, Any] = {
    "range": jinja2.sandbox.safe_range,
    "dict": _dict,
    "namespace": _namespace,
    "raise_exception": _raise_exception,
    "strftime_now": _strftime_now,
}
FILTERS = _build_filters()
TESTS = _build_tests()
