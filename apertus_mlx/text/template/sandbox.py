"""Runs a chat template that nobody trusts: Jinja with a short list of features and a budget."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes as nodes
import jinja2.sandbox
from jinja2.exceptions import SecurityError
from jinja2.nativetypes import NativeCodeGenerator
from jinja2.runtime import Context, Macro, Undefined

from apertus_mlx.text.template import operations
from apertus_mlx.text.template.budget import STEP, LimitError, made, spend, weigh
from apertus_mlx.text.template.control_text import ControlText, concat
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


@jinja2.pass_context
def _print(_: Context, value: Any) -> Any:  # with a context, for Jinja not to print early
    return made(operations.as_text(value))


class SandboxEnvironment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja as chat templates expect it, with a price on everything, for one template."""

    intercepted_binops = frozenset(["+", "-", "*", "%"])
    code_generator_class = NativeCodeGenerator  # which leaves a `ControlText` as it is
    concat = staticmethod(concat)

    def __init__(self, source: str, constant: Callable[[str], str | ControlText]):
        """Compile `source`, in which `constant` replaces each text that the template writes.

        Raises:
            jinja2.TemplateError: it is no template, or uses a feature that is missing here.
        """
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            finalize=_print,
            extensions=[jinja2.ext.loopcontrols, _Generation],
        )
        if len(source) > MAX_SOURCE_CHARACTERS:
            raise LimitError(
                f"it has {len(source)} characters, more than the {MAX_SOURCE_CHARACTERS} allowed"
            )
        tree = self.parse(source)
        texts, size = rewrite_template(tree)
        self._pass_units = STEP + size  # of a loop or macro, whose body is no longer
        guards = {
            "~concat": lambda parts: operations.join("", map(operations.as_text, parts)),
            "~iterate": self._iterate,
            "~made": made,
            "~text": [constant(text) for text in texts].__getitem__,
            "~weighed": lambda value: (weigh(value), value)[1],
        }
        self.globals = dict(operations.GLOBALS)
        self.filters = {**operations.FILTERS, **guards}
        self.tests = dict(operations.TESTS)
        code = self.compile(tree)
        self._template = self.template_class.from_code(self, code, self.globals)

    def write(self, variables: dict[str, Any]) -> Any:
        """Render the template: a `str`, or a `ControlText`."""
        return concat(self._template.root_render_func(self._template.new_context(variables)))

    def _iterate(self, value: Any) -> Iterator[Any]:
        for item in value:
            spend(self._pass_units)
            yield item

    def getattr(self, obj: Any, attribute: str) -> Any:
        """Get an attribute."""
        spend()
        if isinstance(obj, ControlText) and attribute not in obj.METHODS:
            obj.refuse()
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """Subscribe."""
        weigh(argument)
        return super().getitem(obj, argument)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call what a template may call."""
        spend(__self._pass_units)
        if isinstance(__obj, Macro | Undefined) or __obj in operations.GLOBALS.values():
            return __context.call(__obj, *args, **kwargs)
        kwargs.pop("_loop_vars", None)
        kwargs.pop("_block_vars", None)
        return operations.call_method(__obj, args, kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Compute a binary operator."""
        spend(STEP + weigh([left, right]))
        if operator == "%" and isinstance(left, str | ControlText):
            raise SecurityError("% on a text is not available to chat templates")
        if operator == "*":
            for value, count in ((left, right), (right, left)):
                if isinstance(count, int) and not isinstance(value, int | float):
                    units = value.size if isinstance(value, ControlText) else sys.getsizeof(value)
                    spend(units * max(count, 1))
        return made(super().call_binop(context, operator, left, right))
