"""Runs a chat template that nobody trusts: Jinja with a short list of features and a budget.

Every loop pass, call, filter, comparison and operator is charged before it is done. Template
features that no chat template needs are missing, rather than limited.
"""

from __future__ import annotations

import operator
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes as nodes
import jinja2.sandbox
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context, LoopContext, Macro, Undefined
from jinja2.utils import Namespace

from apertus_mlx.text.template.budget import (
    BUDGET_KEY,
    OBJECT_BYTES,
    POINTER_BYTES,
    Budget,
    LimitError,
    budget_of,
)
from apertus_mlx.text.template.functions import FILTERS, GLOBALS, TESTS
from apertus_mlx.text.template.marks import look_past
from apertus_mlx.text.template.rewrite import rewrite_template
from apertus_mlx.text.template.text import (
    MAX_INTEGER_BITS,
    TEXT_METHODS,
    Formatter,
    as_text,
    bounded,
    call_text_method,
    character_bytes,
    join_texts,
    percent_format,
)

MAX_SOURCE_CHARACTERS = 64 * 1024
_METHODS: dict[type, frozenset[str]] = {
    str: TEXT_METHODS,
    dict: frozenset(["copy", "get", "items", "keys", "values"]),
    list: frozenset(["count", "index"]),
    tuple: frozenset(["count", "index"]),
}
_COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "gt": operator.gt,
    "gteq": operator.ge,
    "lt": operator.lt,
    "lteq": operator.le,
    "in": lambda left, right: left in right,
    "notin": lambda left, right: left not in right,
}


@dataclass(frozen=True, slots=True)
class _Format:
    """The `format` method of a template's string, to be run by `SandboxEnvironment.call`."""

    text: str
    maps: bool


class _Generation(jinja2.ext.Extension):
    """The `generation` tag, which marks what a model wrote for training; here it only scopes."""

    tags = {"generation"}  # noqa: RUF012  # as Jinja declares it

    def parse(self, parser: Any) -> nodes.Node:
        """Parse up to `endgeneration`."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _pass(context: Context) -> bool:
    budget_of(context).step()
    return True


def _literal(context: Context, value: Any) -> Any:
    budget = budget_of(context)
    budget.step()
    budget.hold(OBJECT_BYTES + POINTER_BYTES * len(value))
    return value


def _iterate(context: Context, value: Any, unpacks: bool) -> Any:
    look_past(value, "a loop")
    if not unpacks:
        return value
    if isinstance(value, Iterator):
        return map(_unpacked, value)
    budget_of(context).step(len(value) >> 3)
    for item in value:
        look_past(item, "a loop")
    return value


def _unpacked(value: Any) -> Any:
    look_past(value, "a loop")
    return value


def _key(context: Context, value: Any) -> Any:  # noqa: ARG001 - jinja passes it
    if isinstance(value, tuple):
        raise SecurityError("a tuple as a key")
    look_past(value, "a key")
    return value


def _slice(context: Context, value: Any, start: Any, stop: Any, step: Any) -> Any:
    budget = budget_of(context)
    look_past(value, "a slice")
    result = value[start:stop:step]
    if isinstance(result, str):
        budget.step(1 + (len(result) >> 10))
        return budget.text(result)
    budget.step(1 + (len(result) >> 6))
    budget.hold(OBJECT_BYTES + POINTER_BYTES * len(result))
    return result


def _spread(context: Context, value: Any) -> Any:
    if not isinstance(value, list | tuple | dict):
        raise SecurityError(f"a {type(value).__name__} spread into a call")
    budget_of(context).step(1 + len(value))
    return value


def _concat(context: Context, *parts: Any) -> str:
    budget = budget_of(context)
    budget.step()
    return join_texts(budget, "", [as_text(budget, part) for part in parts])


def _compare(context: Context, left: Any, *rest: Any) -> Any:
    budget = budget_of(context)
    result: Any = True
    for name, right in zip(rest[::2], rest[1::2], strict=True):
        budget.weigh(left, "a comparison")
        if not (name in ("in", "notin") and isinstance(right, dict)):
            budget.weigh(right, "a comparison")
        result = _COMPARISONS[name](left, right)
        if not result:
            break
        left = right
    return result


_GUARD_IDS = frozenset(
    map(id, (_pass, _literal, _iterate, _key, _slice, _spread, _concat, _compare))
)


class SandboxEnvironment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja as chat templates expect it, with a price on everything."""

    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "%", "**"])

    def __init__(self) -> None:
        """Make an environment; it may serve many templates, renderings and threads."""
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            finalize=_print,
            extensions=[jinja2.ext.loopcontrols, _Generation],
        )
        self.globals = dict(GLOBALS)
        self.filters = dict(FILTERS)
        self.tests = dict(TESTS)
        self._own = frozenset(id(value) for value in self.globals.values())

    guard_pass = staticmethod(_pass)
    guard_literal = staticmethod(_literal)
    guard_iterate = staticmethod(_iterate)
    guard_key = staticmethod(_key)
    guard_slice = staticmethod(_slice)
    guard_spread = staticmethod(_spread)
    guard_concat = staticmethod(_concat)
    guard_compare = staticmethod(_compare)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Allow data, and the few methods that are safe or priced."""
        if not super().is_safe_attribute(obj, attr, value):
            return False
        if not callable(value) or isinstance(value, Undefined):
            return True
        for kind, names in _METHODS.items():
            if isinstance(obj, kind):
                return attr in names
        return isinstance(obj, LoopContext | Namespace)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """Subscribe; keys are scalars, so that no key takes long to hash."""
        if isinstance(argument, tuple):
            raise SecurityError("a tuple as a key")
        look_past(obj, "a subscript")
        look_past(argument, "a subscript")
        return super().getitem(obj, argument)

    def wrap_str_format(self, value: Any) -> Any:
        """Return a `_Format` for the format methods of strings."""
        methods = types.MethodType | types.BuiltinMethodType
        if (
            isinstance(value, methods)
            and isinstance(value.__self__, str)
            and value.__name__ in ("format", "format_map")
        ):
            return _Format(value.__self__, value.__name__ == "format_map")
        return None

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call what a template may call, and charge for it."""
        if id(__obj) in _GUARD_IDS:
            return __obj(__context, *args)
        budget = budget_of(__context)
        budget.step()
        budget.hold(OBJECT_BYTES)
        if isinstance(__obj, LoopContext):
            look_past(args[:1] and args[0], "a loop")
        if isinstance(__obj, Macro | LoopContext | Undefined) or id(__obj) in __self._own:
            return __context.call(__obj, *args, **kwargs)
        kwargs.pop("_loop_vars", None)
        kwargs.pop("_block_vars", None)
        if isinstance(__obj, _Format):
            if __obj.maps:
                args, kwargs = (), dict(*args)
            return Formatter(__self, budget).vformat(__obj.text, args, kwargs)
        owner = getattr(__obj, "__self__", None)
        if isinstance(__obj, types.BuiltinMethodType | types.MethodType):
            name = __obj.__name__
            if isinstance(owner, str) and name in _METHODS[str]:
                return call_text_method(budget, owner, name, args, kwargs)
            if isinstance(owner, dict | list | tuple) and any(
                isinstance(owner, kind) and name in names for kind, names in _METHODS.items()
            ):
                doing = f"the method {name}"
                budget.weigh(args[:1] if name == "get" else args, doing)
                if name in ("count", "index"):
                    budget.weigh(owner, doing)
                budget.hold(POINTER_BYTES * len(owner) if name == "copy" else 0)
                return __obj(*args, **kwargs)
            if isinstance(owner, LoopContext):
                budget.weigh(args, None if name == "cycle" else f"loop.{name}")
                return __obj(*args, **kwargs)
        raise SecurityError(f"a {type(__obj).__name__} may not be called")

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Compute a binary operator, after charging for its result."""
        budget = budget_of(context)
        budget.step()
        if isinstance(left, str) and operator == "%":
            return percent_format(budget, left, right)
        sized = (str, list, tuple)
        if operator == "*" and (isinstance(left, sized) or isinstance(right, sized)):
            sequence, count = (left, right) if isinstance(left, sized) else (right, left)
            if isinstance(count, int):
                budget.hold(sys.getsizeof(sequence) * max(count, 1))
        elif isinstance(left, sized) and isinstance(right, sized):
            wide = max(character_bytes(left), character_bytes(right))
            budget.hold(OBJECT_BYTES + wide * (len(left) + len(right)))
        elif isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length()
            if operator == "**" and right > 1 and bits > 1 and bits * right > MAX_INTEGER_BITS:
                raise LimitError("it makes a very large number")
            return bounded(super().call_binop(context, operator, left, right))
        return super().call_binop(context, operator, left, right)


def compile_template(
    environment: SandboxEnvironment, source: str, constant: Callable[[str], str]
) -> jinja2.Template:
    """Compile `source`, in which `constant` has replaced each text that the template writes.

    Raises:
        jinja2.TemplateError: it is no template, or uses a feature that is missing here.
    """
    if len(source) > MAX_SOURCE_CHARACTERS:
        raise LimitError(
            f"it has {len(source)} characters, more than the {MAX_SOURCE_CHARACTERS} allowed"
        )
    tree = environment.parse(source)
    tree = rewrite_template(tree, constant)
    return environment.template_class.from_code(
        environment, environment.compile(tree), environment.globals
    )


def render_template(template: jinja2.Template, variables: Mapping[str, Any], budget: Budget) -> str:
    """Render within `budget`.

    Raises:
        jinja2.TemplateError: the template refuses the messages, or the budget the template.
    """
    context = template.new_context({**variables, BUDGET_KEY: budget})
    return "".join(template.root_render_func(context))


@jinja2.pass_context
def _print(context: Context, value: Any) -> str:
    budget = budget_of(context)
    return budget.text(as_text(budget, value))
