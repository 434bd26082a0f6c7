"""The filters, tests, methods, globals and operators that chat templates get.

An operation that can make much from little is charged before it runs; the others after.
"""

from __future__ import annotations

import datetime
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from types import BuiltinMethodType, NoneType
from typing import Any

import jinja2.filters
import jinja2.sandbox
import jinja2.tests
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context, Undefined
from jinja2.utils import Namespace

from apertus_mlx.text.template.budget import STEP, LimitError, made, spend, weigh
from apertus_mlx.text.template.marks import look_past

TEXT_METHODS = frozenset(
    """
    capitalize casefold count endswith find format index isalnum isalpha isascii isdecimal isdigit
    islower isnumeric isspace istitle isupper join lower lstrip partition removeprefix removesuffix
    replace rfind rindex rpartition rsplit rstrip split splitlines startswith strip swapcase title
    upper
    """.split()  # noqa: SIM905
)
_METHODS: dict[type, Iterable[str]] = {
    str: TEXT_METHODS,
    dict: ("copy", "get", "items", "keys", "values"),
    list: ("count", "index"),
    tuple: ("count", "index"),
}
_TEXT_FILTERS = ("capitalize", "format", "indent", "lower", "replace", "title", "trim", "upper")
_LISTING = ("items", "list", "map", "reject", "rejectattr", "reverse", "select", "selectattr")
# These look at no text that is deeper in a value.
_SHALLOW = (*_LISTING, "copy", "d", "default", "first", "get", "keys", "last", "length", "values")
_MOVING = ("d", "default", "format", "indent")
_STRIPPING = ("lstrip", "rstrip", "strip", "trim")
_CHEAP_TESTS = (
    *("boolean", "callable", "defined", "false", "float", "integer", "iterable", "mapping"),
    *("none", "number", "sequence", "string", "true", "undefined"),
)
_TESTS = (
    *("==", "eq", "equalto", "!=", "ne", "<", "lt", "lessthan", "<=", "le", "in", "sameas"),
    *(">", "gt", "greaterthan", ">=", "ge", "lower", "upper", "divisibleby", "even", "odd"),
)


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


def _operate(
    doing: str, function: Callable[..., Any], value: Any, args: Any, kwargs: Any, first: Any = ()
) -> Any:
    """Run a filter, test or method; the last word of `doing` is its name."""
    name = doing.split()[-1]
    spend()
    if isinstance(value, Iterator) and name not in _SHALLOW:
        value = list(value)
    # A token's text has no blanks, so that cutting these off leaves it whole.
    moves = name in _MOVING or (name in _STRIPPING and not args and not kwargs)
    looked_at = args[:1] if name in ("get", "replace") else (args, kwargs)
    if name not in _MOVING:
        weigh(looked_at, doing)
    if name not in _SHALLOW:
        weigh(value, None if moves else doing)
    elif not moves:
        look_past(value, doing)
    if name in _LISTING and hasattr(value, "__len__"):
        spend(64 * len(value))
    part = args[0] if args and isinstance(args[0], str) else ""
    if name in ("rfind", "rindex", "rpartition", "rsplit"):  # quadratic in CPython
        spend(len(value) * len(part) >> 6)
    if name in ("split", "rsplit", "splitlines"):
        spend(80 * (value.count(part) if part else len(value) // 2))
    result = function(*first, value, *args, **kwargs)
    return iter(made(list(result))) if isinstance(result, Iterator) else made(result)


def _filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    pass_argument = getattr(getattr(function, "jinja_pass_arg", None), "name", None)

    @jinja2.pass_context
    def run(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        passed = {"context": context, "environment": context.environment}
        passed["eval_context"] = context.eval_ctx
        first = (passed[pass_argument],) if pass_argument else ()
        value = as_text(value) if name in _TEXT_FILTERS else value
        return _operate(f"the filter {name}", function, value, args, kwargs, first)

    return run


def _test(name: str) -> Callable[..., Any]:
    function: Any = jinja2.tests.TESTS[name]

    def run(value: Any, *args: Any) -> Any:
        if name in ("divisibleby", "even", "odd") and not isinstance(value, int | float):
            raise TypeError(f"the test {name} is for numbers")
        value = as_text(value) if name in ("lower", "upper") else value
        return _operate(f"the test {name}", function, value, args, {})

    return run


def call_method(method: BuiltinMethodType, args: Any, kwargs: Any, formatter: Any) -> Any:
    """Call the method of a text, list or dict, if it is one that templates have."""
    owner: Any = method.__self__
    name = method.__name__
    if name not in _METHODS.get(type(owner), ()):
        raise SecurityError(f"the method {name} of a {type(owner).__name__} may not be called")
    if name == "format":
        return made(formatter.vformat(owner, args, kwargs))
    if name == "join":
        return join(owner, *map(iterate, args), **kwargs)
    function = _replace if name == "replace" else getattr(type(owner), name)
    return _operate(f"the method {name}", function, owner, args, kwargs)


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
        spend(10 * weigh((value, as_text(value)), "formatting"))
        return super().convert_field(value, conversion)


def percent(text: str, values: Any) -> str:
    """Return `text % values`."""
    if re.search(r"%[^a-zA-Z%]*(\*|\d{4})", text):
        raise LimitError("it asks for a very wide field")
    only_moves = "%" not in re.sub("%[%s]", "", text)
    spend(text.count("%") * (1000 + 10 * weigh(values, None if only_moves else "formatting")))
    result: str = text % values
    return made(result)


def check_operator(operator: str, left: Any, right: Any) -> None:
    """Charge for `left operator right` where its result may be much larger than both."""
    spend()
    if operator == "*":
        for sequence, count in ((left, right), (right, left)):
            if isinstance(sequence, str | list | tuple) and isinstance(count, int):
                spend(sys.getsizeof(sequence) * max(count, 1))
    elif operator == "**" and isinstance(right, int) and right > 256:
        raise LimitError("it makes a very large number")


def _replace(text: str, old: Any, new: Any, count: Any = None, /) -> str:
    old, new = as_text(old), as_text(new)
    widest = 1 if text.isascii() and new.isascii() else 4
    spend(widest * (len(text) + text.count(old) * len(new)))
    return text.replace(old, new, -1 if count is None else count)


def _indent(text: str, width: Any = 4, first: bool = False, blank: bool = False) -> str:
    spend((len(width) if isinstance(width, str) else int(width)) * sys.getsizeof(text))
    return jinja2.filters.do_indent(text, width, first, blank)


@jinja2.pass_environment
def _join(environment: Any, value: Any, d: Any = "", attribute: Any = None) -> str:
    items = iterate(value)
    if attribute is not None:
        weigh(attribute, "the filter join")
        items = map(jinja2.filters.make_attrgetter(environment, attribute), items)
    return join(as_text(d), map(as_text, items))


@jinja2.pass_environment
def _sum(environment: Any, value: Any, attribute: Any = None) -> Any:
    return jinja2.filters.sync_do_sum(environment, value, attribute)


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


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    weigh((args, kwargs))
    result = dict(*args, **kwargs)
    weigh(list(result), "a key")
    return made(result)


def _raise_exception(message: object) -> str:
    raise jinja2.TemplateError(str(message)[:300])


def _strftime_now(form: str) -> str:
    if len(form) > 64 or re.search(r"%[^a-zA-Z%]*\d", form):
        raise LimitError("it asks for a very wide field")
    return datetime.datetime.now().strftime(form)


GLOBALS: dict[str, Any] = {
    "range": jinja2.sandbox.safe_range,
    "dict": _dict,
    "namespace": lambda *args, **kwargs: Namespace(_dict(*args, **kwargs)),
    "raise_exception": _raise_exception,
    "strftime_now": _strftime_now,
}
_JINJA_FILTERS = (
    *(*_LISTING, "abs", "capitalize", "d", "default", "dictsort", "first", "float", "int", "last"),
    *("length", "lower", "max", "min", "sort", "title", "trim", "unique", "upper"),
)
FILTERS: dict[str, Any] = {
    **{name: _filter(name, jinja2.filters.FILTERS[name]) for name in _JINJA_FILTERS},
    "count": _filter("length", len),
    "format": _filter("format", lambda text, *args, **kwargs: percent(text, kwargs or args)),
    "indent": _filter("indent", _indent),
    "join": _join,
    "replace": _filter("replace", _replace),
    "string": as_text,
    "sum": _filter("sum", _sum),
    "tojson": _to_json,
}
TESTS: dict[str, Any] = {
    **{name: jinja2.tests.TESTS[name] for name in _CHEAP_TESTS},
    **{name: _test(name) for name in _TESTS},
}
