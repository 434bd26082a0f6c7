"""Runs a chat template that nobody trusts: Jinja with a short list of features and a budget.

Every loop pass, call, filter, comparison and operator is charged before it is done: in steps (one,
plus one for each value and each KiB of text that it has to look at), and in bytes that it makes.
So the same template and messages always end the same way, on any machine and in any thread.
Template features that no chat template needs are missing, rather than limited.
"""

from __future__ import annotations

import datetime
import json
import operator
import re
import string
import sys
import types
from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, ValuesView
from dataclasses import dataclass
from types import NoneType
from typing import Any, ClassVar

import jinja2
import jinja2.ext
import jinja2.filters
import jinja2.nodes as nodes
import jinja2.sandbox
import jinja2.tests
from jinja2.runtime import Context, LoopContext, Macro, Undefined
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer
from markupsafe import Markup

MAX_SOURCE_CHARACTERS = 64 * 1024
MAX_NODES = 8_000
BASE_STEPS = 100_000
STEPS_PER_VALUE = 100
STEPS_PER_KIB = 16
BASE_BYTES = 16 * 2**20
BYTES_PER_VALUE = 2**10
BYTES_PER_BYTE = 32
MAX_DEPTH = 64
MAX_INTEGER_BITS = 256
MAX_INDENT = 16
_OBJECT_BYTES = 128
_POINTER_BYTES = 16
_BUDGET = " budget"  # no identifier, so that a template cannot name it

_METHODS: dict[type, frozenset[str]] = {
    str: frozenset(
        ["capitalize", "casefold", "count", "endswith", "find", "format", "format_map", "index", "isalnum", "isalpha", "isascii", "isdecimal", "isdigit", "islower", "isnumeric", "isspace", "istitle", "isupper", "join", "lower", "lstrip", "partition", "removeprefix", "removesuffix", "replace", "rfind", "rindex", "rpartition", "rsplit", "rstrip", "split", "splitlines", "startswith", "strip", "swapcase", "title", "upper"]
    ),
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
_ALLOWED_NODES = (
    nodes.Expr,
    nodes.Operand,
    nodes.Keyword,
    nodes.Pair,
    nodes.Template,
    nodes.Output,
    nodes.For,
    nodes.If,
    nodes.Macro,
    nodes.CallBlock,
    nodes.FilterBlock,
    nodes.With,
    nodes.Assign,
    nodes.AssignBlock,
    nodes.Scope,
    nodes.Break,
    nodes.Continue,
)
# Texts that a template looks for in a message, rather than writes.
_SEARCHES = frozenset(
    ["count", "endswith", "find", "index", "lstrip", "partition", "removeprefix", "removesuffix", "replace", "rfind", "rindex", "rpartition", "rsplit", "rstrip", "split", "startswith", "strip"]
)
_SEQUENCES = (list, tuple, KeysView, ValuesView, ItemsView)
_SCALARS = (bool, int, float, NoneType, Undefined)


class LimitError(jinja2.TemplateError):
    """The template asked for more than its budget."""


@dataclass(slots=True)
class Budget:
    """What one rendering may still do."""

    steps: int
    n_bytes: int

    @classmethod
    def for_input(cls, values: int, text_bytes: int) -> Budget:
        """Return the budget for messages of so many values with so much text in all."""
        return cls(
            steps=BASE_STEPS + STEPS_PER_VALUE * values + STEPS_PER_KIB * (text_bytes >> 10),
            n_bytes=BASE_BYTES + BYTES_PER_VALUE * values + BYTES_PER_BYTE * text_bytes,
        )

    def step(self, count: int = 1) -> None:
        """Charge work."""
        self.steps -= count
        if self.steps < 0:
            raise LimitError("it runs too long (the step limit)")

    def hold(self, n_bytes: int) -> None:
        """Charge memory; what was let go is not paid back."""
        self.n_bytes -= n_bytes
        if self.n_bytes < 0:
            raise LimitError("it makes too much text or data (the memory limit)")

    def text(self, text: str) -> str:
        """Charge for making `text`."""
        self.hold(sys.getsizeof(text))
        return text

    def look(self, value: object) -> tuple[int, int]:
        """Charge for looking at all of `value`; return its count of values and bytes of text.

        Data that contains the same part twice counts it twice, as printing or comparing it would.
        """
        count = text_bytes = 0
        level = [value]
        for depth in range(MAX_DEPTH):
            inner: list[Any] = []
            for item in level:
                if isinstance(item, str):
                    size = sys.getsizeof(item)
                    text_bytes += size
                    self.step(size >> 10)
                elif isinstance(item, _SEQUENCES):
                    self.step(len(item))
                    inner.extend(item)
                elif isinstance(item, dict):
                    self.step(2 * len(item))
                    inner.extend(item.keys())
                    inner.extend(item.values())
                elif isinstance(item, range):
                    self.step(len(item) >> 2)
                elif depth and not isinstance(item, _SCALARS):
                    raise LimitError(f"it puts a {type(item).__name__} into a list")
            count += len(level)
            if not inner:
                self.step(1 + (count >> 3))
                return count, text_bytes
            level = inner
        raise LimitError(f"it nests data more than {MAX_DEPTH} deep")


@dataclass(frozen=True, slots=True)
class _Format:
    """The `format` method of a template's string, to be run by `SandboxEnvironment.call`."""

    text: str
    maps: bool


class _Generation(jinja2.ext.Extension):
    """The `generation` tag, which marks what a model wrote for training; here it only scopes."""

    tags: ClassVar[set[str]] = {"generation"}

    def parse(self, parser: Any) -> nodes.Node:
        """Parse up to `endgeneration`."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _budget(context: Context) -> Budget:
    budget: Budget = context.parent[_BUDGET]
    return budget


def _pass(context: Context) -> bool:
    _budget(context).step()
    return True


def _literal(context: Context, value: Any) -> Any:
    budget = _budget(context)
    budget.step()
    budget.hold(_OBJECT_BYTES + _POINTER_BYTES * len(value))
    return value


def _key(context: Context, value: Any) -> Any:
    if isinstance(value, tuple):
        raise jinja2.sandbox.SecurityError("a tuple as a key")
    return value


def _slice(context: Context, value: Any, start: Any, stop: Any, step: Any) -> Any:
    budget = _budget(context)
    result = value[start:stop:step]
    if isinstance(result, str):
        budget.step(1 + (len(result) >> 10))
        return budget.text(result)
    budget.step(1 + (len(result) >> 6))
    budget.hold(_OBJECT_BYTES + _POINTER_BYTES * len(result))
    return result


def _spread(context: Context, value: Any) -> Any:
    if not isinstance(value, list | tuple | dict):
        raise jinja2.sandbox.SecurityError(f"a {type(value).__name__} spread into a call")
    _budget(context).step(1 + len(value))
    return value


def _concat(context: Context, *parts: Any) -> str:
    budget = _budget(context)
    budget.step()
    return _join(budget, "", [_text(budget, part) for part in parts])


def _compare(context: Context, left: Any, *rest: Any) -> Any:
    budget = _budget(context)
    result: Any = True
    for name, right in zip(rest[::2], rest[1::2], strict=True):
        budget.look(left)
        if not (name in ("in", "notin") and isinstance(right, dict)):
            budget.look(right)
        result = _COMPARISONS[name](left, right)
        if not result:
            break
        left = right
    return result


_GUARD_IDS = frozenset(map(id, (_pass, _literal, _key, _slice, _spread, _concat, _compare)))


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
        self.globals = {
            "range": jinja2.sandbox.safe_range,
            "dict": _dict,
            "namespace": _namespace,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }
        self.filters = dict(_FILTERS)
        self.tests = dict(_TESTS)
        self._own = frozenset(id(value) for value in self.globals.values())

    guard_pass = staticmethod(_pass)
    guard_literal = staticmethod(_literal)
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
            raise jinja2.sandbox.SecurityError("a tuple as a key")
        return super().getitem(obj, argument)

    def wrap_str_format(self, value: Any) -> Any:
        """Return a `_Format` for the format methods of strings."""
        if isinstance(value, types.MethodType | types.BuiltinMethodType) and isinstance(
            value.__self__, str
        ):
            if value.__name__ in ("format", "format_map"):
                return _Format(value.__self__, value.__name__ == "format_map")
        return None

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call what a template may call, and charge for it."""
        if id(__obj) in _GUARD_IDS:
            return __obj(__context, *args)
        budget = _budget(__context)
        budget.step()
        budget.hold(_OBJECT_BYTES)
        if isinstance(__obj, Macro | LoopContext | Undefined) or id(__obj) in __self._own:
            return __context.call(__obj, *args, **kwargs)
        kwargs.pop("_loop_vars", None)
        kwargs.pop("_block_vars", None)
        if isinstance(__obj, _Format):
            if __obj.maps:
                args, kwargs = (), dict(args[0])
            return _Formatter(__self, budget).vformat(__obj.text, args, kwargs)
        owner = getattr(__obj, "__self__", None)
        if isinstance(__obj, types.BuiltinMethodType | types.MethodType):
            name = __obj.__name__
            if isinstance(owner, str) and name in _METHODS[str]:
                return _call_text_method(budget, owner, name, args, kwargs)
            if isinstance(owner, dict | list | tuple) and any(
                isinstance(owner, kind) and name in names for kind, names in _METHODS.items()
            ):
                budget.look(args)
                if name in ("count", "index"):
                    budget.look(owner)
                budget.hold(_POINTER_BYTES * len(owner) if name == "copy" else 0)
                return __obj(*args, **kwargs)
            if isinstance(owner, LoopContext):
                budget.look(args)
                return __obj(*args, **kwargs)
        raise jinja2.sandbox.SecurityError(f"a {type(__obj).__name__} may not be called")

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Compute a binary operator, after charging for its result."""
        budget = _budget(context)
        budget.step()
        if isinstance(left, str) and operator == "%":
            return _percent(budget, left, right)
        sized = (str, list, tuple)
        if operator == "*" and (isinstance(left, sized) or isinstance(right, sized)):
            sequence, count = (left, right) if isinstance(left, sized) else (right, left)
            if isinstance(count, int):
                budget.hold(sys.getsizeof(sequence) * max(count, 1))
        elif isinstance(left, sized) and isinstance(right, sized):
            width = 5 if isinstance(left, Markup) or isinstance(right, Markup) else 1
            wide = max(_character_bytes(left), _character_bytes(right))
            budget.hold(_OBJECT_BYTES + wide * width * (len(left) + len(right)))
        elif isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length()
            if operator == "**" and right > 1 and bits > 1 and bits * right > MAX_INTEGER_BITS:
                raise LimitError("it makes a very large number")
            return _number(super().call_binop(context, operator, left, right))
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
    for count, node in enumerate(tree.find_all(nodes.Node)):
        if count > MAX_NODES:
            raise LimitError(f"it has more than {MAX_NODES} parts")
        if not isinstance(node, _ALLOWED_NODES):
            raise jinja2.sandbox.SecurityError(
                f"line {node.lineno}: {type(node).__name__} is not available to chat templates"
            )
    tree = _Charge(constant).visit(tree)
    return environment.template_class.from_code(
        environment, environment.compile(tree), environment.globals
    )


def render_template(template: jinja2.Template, variables: Mapping[str, Any], budget: Budget) -> str:
    """Render within `budget`.

    Raises:
        jinja2.TemplateError: the template refuses the messages, or the budget the template.
    """
    context = template.new_context({**variables, _BUDGET: budget})
    return "".join(template.root_render_func(context))


class _Charge(NodeTransformer):
    """Rewrites a template so that the operations Jinja would run itself are charged too."""

    def __init__(self, constant: Callable[[str], str]):
        self._constant = constant
        self._searched: set[int] = set()

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:
        return nodes.Const(self._constant(node.data), lineno=node.lineno)

    def visit_Const(self, node: nodes.Const) -> nodes.Node:
        if isinstance(node.value, str) and id(node) not in self._searched:
            return nodes.Const(self._constant(node.value), lineno=node.lineno)
        return node

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        tick = _guard("guard_pass", [], node.lineno)
        node.body.insert(0, nodes.ExprStmt(tick, lineno=node.lineno))
        if node.test is not None:
            node.test = nodes.And(tick, node.test, lineno=node.lineno)
        return node

    def visit_Call(self, node: nodes.Call) -> nodes.Node:
        if isinstance(node.node, nodes.Getattr) and node.node.attr in _SEARCHES:
            self._searched.update(id(argument) for argument in node.args[:1])
        self.generic_visit(node)
        for name in ("dyn_args", "dyn_kwargs"):
            if (values := getattr(node, name)) is not None:
                setattr(node, name, _guard("guard_spread", [values], node.lineno))
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self._searched.add(id(node.expr))
        self._searched.update(id(operand.expr) for operand in node.ops)
        self.generic_visit(node)
        parts = [node.expr]
        for operand in node.ops:
            parts += [nodes.Const(operand.op, lineno=node.lineno), operand.expr]
        return _guard("guard_compare", parts, node.lineno)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _guard("guard_concat", node.nodes, node.lineno)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            return node
        ends = [node.arg.start, node.arg.stop, node.arg.step]
        none = nodes.Const(None, lineno=node.lineno)
        return _guard("guard_slice", [node.node, *(end or none for end in ends)], node.lineno)

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:
        self.generic_visit(node)
        if not isinstance(node.key, nodes.Const):
            node.key = _guard("guard_key", [node.key], node.lineno)
        return node

    def visit_List(self, node: nodes.List) -> nodes.Node:
        self.generic_visit(node)
        return _guard("guard_literal", [node], node.lineno)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        return _guard("guard_literal", [node], node.lineno)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return node if node.ctx != "load" else _guard("guard_literal", [node], node.lineno)


def _guard(name: str, arguments: list[nodes.Expr], line: int) -> nodes.Call:
    function = nodes.EnvironmentAttribute(name, lineno=line)
    return nodes.Call(function, arguments, [], None, None, lineno=line)


def _text(budget: Budget, value: Any) -> str:
    """Return `value` as a template prints it, charged."""
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple | dict):
        count, text_bytes = budget.look(value)
        budget.hold(10 * text_bytes + 80 * count)
    elif not isinstance(value, _SCALARS):
        raise LimitError(f"it prints a {type(value).__name__}")
    return str(value)


@jinja2.pass_context
def _print(context: Context, value: Any) -> str:
    budget = _budget(context)
    return budget.text(_text(budget, value))


def _character_bytes(value: str | list[Any] | tuple[Any, ...]) -> int:
    if not isinstance(value, str):
        return 8
    return 1 if value.isascii() else 4


def _join(budget: Budget, separator: str, texts: list[str]) -> str:
    length = sum(map(len, texts)) + len(separator) * max(len(texts) - 1, 0)
    wide = max((_character_bytes(text) for text in (separator, *texts)), default=1)
    budget.step(length >> 10)
    budget.hold(_OBJECT_BYTES + wide * length)
    return separator.join(texts)


def _number(value: Any) -> Any:
    if isinstance(value, int) and value.bit_length() > MAX_INTEGER_BITS:
        raise LimitError("it makes a very large number")
    return value


def _percent(budget: Budget, text: str, values: Any) -> str:
    """Compute `text % values`, refusing wide fields."""
    if re.search(r"%[^a-zA-Z%]*(\*|\d{4})", text):
        raise LimitError("it asks for a very wide field")
    count, text_bytes = budget.look(values)
    places = text.count("%")
    budget.step(places)
    budget.hold(sys.getsizeof(text) + places * (1000 + 10 * text_bytes + 80 * count))
    result: str = text % values
    return result


class _Formatter(jinja2.sandbox.SandboxedFormatter):
    """`str.format` in the sandbox, refusing wide fields."""

    def __init__(self, environment: SandboxEnvironment, budget: Budget):
        super().__init__(environment)
        self._charge = budget

    def format_field(self, value: Any, format_spec: str) -> Any:
        """Format one field, charged."""
        self._charge.step()
        if len(format_spec) > 64 or re.search(r"\d{4}", format_spec):
            raise LimitError("it asks for a very wide field")
        return self._charge.text(
            format(value if format_spec else _text(self._charge, value), format_spec)
        )

    def convert_field(self, value: Any, conversion: Any) -> Any:
        """Apply `!s`, `!r` or `!a`, charged."""
        if conversion is None:
            return value
        self._charge.hold(10 * sys.getsizeof(_text(self._charge, value)))
        return string.Formatter.convert_field(self, value, conversion)


def _call_text_method(
    budget: Budget, text: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    budget.look((text, *args, *kwargs.values()) if name != "join" else text)
    if name == "join":
        return _join(budget, text, _strings(budget, args[0]))
    if name == "replace":
        return _replace(budget, text, *args, **kwargs)
    if name in ("split", "rsplit", "splitlines"):
        budget.hold(80 * _pieces(text, name, *args, **kwargs) + sys.getsizeof(text))
    elif name in ("lower", "upper", "title", "capitalize", "casefold", "swapcase"):
        budget.hold(3 * sys.getsizeof(text))
    elif name not in ("count", "find", "index"):
        budget.hold(sys.getsizeof(text))
    return getattr(text, name)(*args, **kwargs)


def _strings(budget: Budget, values: Any) -> list[str]:
    """Return the texts to join, as `str.join` demands them."""
    if not isinstance(values, (Iterator, str, dict, *_SEQUENCES)):
        raise TypeError("can only join a list of texts")
    if not isinstance(values, Iterator):
        budget.look(values)
    texts = list(values)
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("can only join texts")
    return texts


def _pieces(text: str, name: str, sep: Any = None, maxsplit: Any = -1, **_: Any) -> int:
    """Return at least the number of pieces that a split makes."""
    if name == "splitlines":
        return 1 + sum(map(text.count, "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"))
    if isinstance(maxsplit, int) and maxsplit >= 0:
        return maxsplit + 1 if maxsplit < len(text) else len(text) + 1
    if isinstance(sep, str) and sep:
        return 1 + text.count(sep)
    if text.isascii():
        return 1 + sum(map(text.count, " \t\n\r\v\f\x1c\x1d\x1e\x1f"))
    return 1 + len(text) // 2


def _replace(budget: Budget, text: str, old: Any, new: Any, count: Any = -1) -> str:
    old, new = _text(budget, old), _text(budget, new)
    budget.look((text, old, new))
    places = text.count(old)
    wide = max(_character_bytes(text), _character_bytes(new))
    budget.hold(_OBJECT_BYTES + wide * (len(text) + places * max(len(new) - len(old), 0)))
    return text.replace(old, new, -1 if count is None else count)


# Globals


def _raise_exception(message: object) -> str:
    raise jinja2.TemplateError(f"it refuses the messages: {str(message)[:300]}")


def _strftime_now(form: str) -> str:
    if len(form) > 64 or re.search(r"%[^a-zA-Z%]*\d", form):
        raise LimitError("it asks for a very wide field")
    return datetime.datetime.now().strftime(form)


@jinja2.pass_context
def _dict(context: Context, *args: Any, **kwargs: Any) -> dict[Any, Any]:
    _budget(context).look((args, kwargs))
    result = dict(*args, **kwargs)
    _budget(context).hold(_OBJECT_BYTES + 4 * _POINTER_BYTES * len(result))
    return result


@jinja2.pass_context
def _namespace(context: Context, *args: Any, **kwargs: Any) -> Namespace:
    names = dict(*args, **kwargs)
    if any(str(name).startswith("_") for name in names):
        raise jinja2.sandbox.SecurityError("a namespace attribute that starts with _")
    _budget(context).hold(4 * _OBJECT_BYTES + 4 * _POINTER_BYTES * len(names))
    return Namespace(names)


# Filters


def _counted(budget: Budget, values: Iterator[Any]) -> Iterator[Any]:
    for value in values:
        budget.step()
        yield value


def _charged(function: Callable[..., Any], *, looks: bool, context_first: bool) -> Any:
    """Return Jinja's filter `function` with its work charged to the budget."""

    @jinja2.pass_context
    def run(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        budget = _budget(context)
        budget.step()
        budget.hold(_OBJECT_BYTES)
        if isinstance(value, Iterator):
            value = _counted(budget, value)
            if looks:
                value = list(value)
        if looks:
            budget.look((args, kwargs))
            count, text_bytes = budget.look(value)
            budget.hold(3 * text_bytes + 2 * _POINTER_BYTES * count)
        first: tuple[Any, ...] = (context,) if context_first else ()
        result = function(*first, value, *args, **kwargs)
        return _counted(budget, result) if isinstance(result, Iterator) else _number(result)

    return run


def _with_environment(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(context: Context, *args: Any, **kwargs: Any) -> Any:
        return function(context.environment, *args, **kwargs)

    return run


def _list(value: Any) -> list[Any]:
    return list(value)


def _string(context: Context, value: Any) -> str:
    return _text(_budget(context), value)


def _join_filter(context: Context, value: Any, d: Any = "", attribute: Any = None) -> str:
    budget = _budget(context)
    if attribute is not None:
        value = map(jinja2.filters.make_attrgetter(context.environment, attribute), value)
    return _join(budget, _text(budget, d), [_text(budget, item) for item in value])


def _replace_filter(context: Context, value: Any, old: Any, new: Any, count: Any = None) -> str:
    budget = _budget(context)
    return _replace(budget, _text(budget, value), old, new, count)


def _indent(
    context: Context, value: Any, width: Any = 4, first: bool = False, blank: bool = False
) -> str:
    budget = _budget(context)
    text = _text(budget, value)
    if (len(width) if isinstance(width, str) else int(width)) > 64:
        raise LimitError("it indents very far")
    budget.hold(4 * 64 * _pieces(text, "splitlines") + 2 * sys.getsizeof(text))
    return jinja2.filters.do_indent(text, width, first, blank)


def _format_filter(context: Context, value: Any, *args: Any, **kwargs: Any) -> str:
    budget = _budget(context)
    return _percent(budget, _text(budget, value), kwargs or args)


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
    budget = _budget(context)
    count, text_bytes = budget.look(value)
    wide = len(indent) if isinstance(indent, str) else indent or 0
    if wide > MAX_INDENT or (separators and len("".join(separators)) > MAX_INDENT):
        raise LimitError("it indents very far")
    each = 80 if indent is None else 80 + wide * MAX_DEPTH
    budget.hold(6 * text_bytes + each * count)
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _build_filters() -> dict[str, Any]:
    standard = jinja2.filters.FILTERS
    filters: dict[str, Any] = {}
    for name in ["default", "d", "items", "length", "count"]:
        filters[name] = _charged(standard[name], looks=False, context_first=False)
    for name in ["abs", "capitalize", "dictsort", "escape", "e", "float", "int", "lower", "safe", "title", "trim", "upper"]:
        filters[name] = _charged(standard[name], looks=True, context_first=False)
    filters["reverse"] = _charged(standard["reverse"], looks=True, context_first=False)
    filters["list"] = _charged(_list, looks=True, context_first=False)
    for name in ("sort", "unique", "min", "max"):
        filters[name] = _charged(_with_environment(standard[name]), looks=True, context_first=True)
    filters["first"] = _charged(
        _with_environment(jinja2.filters.sync_do_first), looks=False, context_first=True
    )
    filters["last"] = _charged(
        _with_environment(jinja2.filters.do_last), looks=False, context_first=True
    )
    lazy = {
        "map": jinja2.filters.sync_do_map,
        "select": jinja2.filters.sync_do_select,
        "reject": jinja2.filters.sync_do_reject,
        "selectattr": jinja2.filters.sync_do_selectattr,
        "rejectattr": jinja2.filters.sync_do_rejectattr,
    }
    for name, function in lazy.items():
        filters[name] = _charged(function, looks=False, context_first=True)
    for name, function in {
        "string": _string,
        "join": _join_filter,
        "replace": _replace_filter,
        "indent": _indent,
        "format": _format_filter,
        "sum": _sum,
        "tojson": _to_json,
    }.items():
        filters[name] = _charged(function, looks=name in ("join", "sum"), context_first=True)
    return filters


def _build_tests() -> dict[str, Any]:
    constant_time = ["boolean", "callable", "defined", "escaped", "false", "float", "integer", "iterable", "mapping", "none", "number", "sameas", "sequence", "string", "true", "undefined"]
    compare = (
        ["!=", "<", "<=", "==", ">", ">=", "eq", "equalto", "ge", "greaterthan", "gt", "in", "le", "lessthan", "lower", "lt", "ne", "upper"]
    )
    arithmetic = ["divisibleby", "even", "odd"]

    def charged(name: str) -> Any:
        function = jinja2.tests.TESTS[name]

        @jinja2.pass_context
        def run(context: Context, value: Any, *args: Any) -> Any:
            budget = _budget(context)
            budget.step()
            if name in arithmetic and not isinstance(value, int | float):
                raise TypeError(f"the test {name} is for numbers")
            if name in compare:
                budget.look(value)
                budget.look(args)
            return function(value, *args)

        return run

    return {name: charged(name) for name in (*constant_time, *compare, *arithmetic)}


_FILTERS = _build_filters()
_TESTS = _build_tests()
