"""Runs a chat template that nobody trusts: Jinja with a short list of features and a budget."""

from __future__ import annotations

from collections.abc import Callable
from types import BuiltinMethodType
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes as nodes
import jinja2.sandbox
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context, LoopContext, Macro, Undefined

from apertus_mlx.text.template.budget import LimitError, made, spend, weigh
from apertus_mlx.text.template.marks import look_past
from apertus_mlx.text.template.operations import (
    FILTERS,
    GLOBALS,
    TESTS,
    Formatter,
    as_text,
    call_method,
    check_operator,
    iterate,
    join,
    percent,
)
from apertus_mlx.text.template.rewrite import rewrite_template

MAX_SOURCE_CHARACTERS = 64 * 1024


class _Generation(jinja2.ext.Extension):
    """The `generation` tag, which marks what a model wrote for training; here it only scopes."""

    tags = {"generation"}  # noqa: RUF012  # as Jinja declares it

    def parse(self, parser: Any) -> nodes.Node:
        """Parse up to `endgeneration`."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _looked(value: Any, doing: str, is_searched: bool = False) -> Any:
    if doing == "a slice":
        look_past(value, doing)
    elif not (is_searched and isinstance(value, dict)):
        weigh(value, doing)
    return value


# What `rewrite_template` puts around what Jinja runs itself.
_GUARDS: dict[str, Callable[..., Any]] = {
    "~iterate": iterate,
    "~spend": spend,
    "~made": made,
    "~looked": _looked,
    "~concat": lambda parts: join("", map(as_text, parts)),
}
_GLOBAL_IDS = frozenset(map(id, GLOBALS.values()))


@jinja2.pass_context
def _print(_: Context, value: Any) -> str:  # with a context, for Jinja not to print early
    return made(as_text(value))


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
        self.filters = {**FILTERS, **_GUARDS}
        self.tests = dict(TESTS)

    def getattr(self, obj: Any, attribute: str) -> Any:
        """Get an attribute."""
        spend(64)
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """Subscribe."""
        look_past(obj, "a subscript")
        weigh(argument, "a subscript")
        return super().getitem(obj, argument)

    def call_filter(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Run a filter that a template names in a string, as in `map('upper')`."""
        if name in _GUARDS:
            raise SecurityError(f"no filter named {name}")
        return super().call_filter(name, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> None:
        """Leave `str.format` to `call`."""

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call what a template may call."""
        spend()
        owner = getattr(__obj, "__self__", None)
        if isinstance(__obj, BuiltinMethodType):
            kwargs.pop("_loop_vars", None)
            kwargs.pop("_block_vars", None)
            return call_method(__obj, args, kwargs, Formatter(__self))
        if isinstance(__obj, LoopContext):
            args = (iterate(*args[:1]), *args[1:])
        elif isinstance(owner, LoopContext):
            weigh(args, None if __obj.__name__ == "cycle" else f"loop.{__obj.__name__}")
        elif not isinstance(__obj, Macro | Undefined) and id(__obj) not in _GLOBAL_IDS:
            raise SecurityError(f"a {type(__obj).__name__} may not be called")
        return __context.call(__obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Compute a binary operator."""
        if isinstance(left, str) and operator == "%":
            return percent(left, right)
        check_operator(operator, left, right)
        return made(super().call_binop(context, operator, left, right))


def compile_template(source: str, constant: Callable[[str], str]) -> jinja2.Template:
    """Compile `source`, in which `constant` has replaced each text that the template writes.

    Raises:
        jinja2.TemplateError: it is no template, or uses a feature that is missing here.
    """
    if len(source) > MAX_SOURCE_CHARACTERS:
        raise LimitError(
            f"it has {len(source)} characters, more than the {MAX_SOURCE_CHARACTERS} allowed"
        )
    environment = SandboxEnvironment()
    tree = rewrite_template(environment.parse(source), constant)
    code = environment.compile(tree)
    return environment.template_class.from_code(environment, code, environment.globals)
