"""Runs a chat template that nobody trusts: Jinja with a short list of features and a budget."""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes as nodes
import jinja2.sandbox
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context, Macro, Undefined

from apertus_mlx.text.template import operations
from apertus_mlx.text.template.budget import STEP, LimitError, charged, spend, weigh
from apertus_mlx.text.template.rewrite import rewrite_template

MAX_SOURCE_CHARACTERS = 64 * 1024
MAX_INTEGER_BITS = 256
_TEXTS = "~texts"  # no name that a template can say


class _Generation(jinja2.ext.Extension):
    """The `generation` tag, which marks what a model wrote for training; here it only scopes."""

    tags = {"generation"}  # noqa: RUF012  # as Jinja declares it

    def parse(self, parser: Any) -> nodes.Node:
        """Parse up to `endgeneration`."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class SandboxEnvironment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja as chat templates expect it, with a price on everything, for one template.

    Attributes:
        texts: What the template's source writes, or compares with what it writes.
    """

    intercepted_binops = frozenset(["+", "-", "*", "%"])

    def __init__(self, source: str):
        """Compile `source`.

        Raises:
            jinja2.TemplateError: it is no template, or uses a feature that is missing here.
        """
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            # With a context, for Jinja not to print early.
            finalize=jinja2.pass_context(lambda _, value: operations.as_text(value)),
            extensions=[jinja2.ext.loopcontrols, _Generation],
        )
        if len(source) > MAX_SOURCE_CHARACTERS:
            raise LimitError(
                f"it has {len(source)} characters, more than the {MAX_SOURCE_CHARACTERS} allowed"
            )
        tree = self.parse(source)
        self.texts, size = rewrite_template(tree)
        self._pass_units = STEP + size  # of a loop or macro, whose body is no longer
        guards = {
            "~iterate": lambda value: charged(value, self._pass_units),
            "~text": jinja2.pass_context(lambda context, index: context[_TEXTS][index]),
            "~weigh": lambda value: (weigh(value), value)[1],
        }
        self.globals = dict(operations.GLOBALS)
        self.filters = {**operations.FILTERS, **guards}
        self.tests = dict(operations.TESTS)
        code = self.compile(tree)
        self._template = self.template_class.from_code(self, code, self.globals)

    def write(self, variables: Mapping[str, Any], texts: Sequence[str]) -> str:
        """Return what the template writes if it has `texts` in place of its own."""
        context = self._template.new_context({**variables, _TEXTS: texts})
        return "".join(self._template.root_render_func(context))

    def getattr(self, obj: Any, attribute: str) -> Any:
        """Get an attribute."""
        spend()
        method = operations.METHODS.get(type(obj), {}).get(attribute)
        return functools.partial(method, obj) if method else super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """Subscribe."""
        spend(STEP + weigh(argument))
        return super().getitem(obj, argument)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call what a template may call."""
        spend(__self._pass_units + STEP * (len(args) + len(kwargs)))
        allowed = isinstance(__obj, functools.partial | Macro | Undefined)
        if not allowed and __obj not in operations.GLOBALS.values():
            name = getattr(__obj, "__name__", type(__obj).__name__)
            raise SecurityError(f"{name} is not available to chat templates")
        return __context.call(__obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Compute a binary operator."""
        spend(STEP + weigh(left, right))
        if operator == "%" and isinstance(left, str):
            raise SecurityError("% on a text is not available to chat templates")
        if operator == "*":
            for value, count in ((left, right), (right, left)):
                if isinstance(count, int) and not isinstance(value, int | float):
                    spend(sys.getsizeof(value) * max(count, 1))
        result = super().call_binop(context, operator, left, right)
        if isinstance(result, int) and result.bit_length() > MAX_INTEGER_BITS:
            raise LimitError("it makes a very large number")
        return result
