"""Rewrites a parsed chat template so that each of its operations has a price.

Jinja runs loops, comparisons, slices, literals and `~` itself. Here each gets a guard: a filter of
the sandbox whose name no template can write. Statements that no chat template needs are refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jinja2.nodes as nodes
from jinja2.exceptions import SecurityError
from jinja2.visitor import NodeTransformer

from apertus_mlx.text.template.budget import LimitError

MAX_NODES = 8_000
UNITS_PER_NODE = 4
_STATEMENTS = (
    *(nodes.Assign, nodes.AssignBlock, nodes.Break, nodes.CallBlock, nodes.Continue, nodes.For),
    *(nodes.FilterBlock, nodes.If, nodes.Macro, nodes.Output, nodes.Scope, nodes.With),
)
# Texts that a template looks for in a message, rather than writes.
_SEARCHES = frozenset(
    """
    count endswith find index lstrip partition removeprefix removesuffix replace rfind rindex
    rpartition rsplit rstrip split startswith strip
    """.split()  # noqa: SIM905
)


def rewrite_template(tree: nodes.Template, constant: Callable[[str], str]) -> nodes.Template:
    """Return `tree` with guards, and each text that the template writes put through `constant`.

    Raises:
        jinja2.TemplateError: it is too large, or uses a feature that is missing here.
    """
    for count, node in enumerate(tree.find_all(nodes.Node)):
        if count > MAX_NODES:
            raise LimitError(f"it has more than {MAX_NODES} parts")
        unknown = isinstance(node, nodes.Stmt) and not isinstance(node, _STATEMENTS)
        if unknown or _unpacks_oddly(node):
            raise SecurityError(
                f"line {node.lineno}: {type(node).__name__} is not available to chat templates"
            )
    rewritten: nodes.Template = _Guard(constant).visit(tree)
    return rewritten


class _Guard(NodeTransformer):
    """Puts a guard, a filter, around the operations that Jinja runs itself."""

    def __init__(self, constant: Callable[[str], str]):
        self._constant = constant
        self._searched: set[int] = set()

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:
        return nodes.Const(self._constant(node.data), lineno=node.lineno)

    def visit_Const(self, node: nodes.Const) -> nodes.Node:
        if isinstance(node.value, str) and id(node) not in self._searched:
            return nodes.Const(self._constant(node.value), lineno=node.lineno)
        return node

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        node.nodes = [_without_safe(part) for part in node.nodes]
        return self.generic_visit(node)

    def visit_For(self, node: nodes.For) -> nodes.Node:
        units = _pass_units(node)
        self.generic_visit(node)
        node.iter = _guard("iterate", node.iter, isinstance(node.target, nodes.Tuple), units)
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        tick = _guard("spend", nodes.Const(_pass_units(node), lineno=node.lineno))
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(tick, lineno=node.lineno))
        return node

    visit_CallBlock = visit_Macro

    def visit_Assign(self, node: nodes.Assign) -> nodes.Node:
        self.generic_visit(node)
        if isinstance(node.target, nodes.Tuple):
            node.node = _guard("iterate", node.node)
        return node

    def visit_Filter(self, node: nodes.Filter) -> nodes.Node:
        if node.name == "replace":
            self._searched.update(id(argument) for argument in node.args[:1])
        return self.generic_visit(node)

    def visit_Call(self, node: nodes.Call) -> nodes.Node:
        if isinstance(node.node, nodes.Getattr) and node.node.attr in _SEARCHES:
            self._searched.update(id(argument) for argument in node.args[:1])
        self.generic_visit(node)
        if node.dyn_args is not None:
            node.dyn_args = _guard("iterate", node.dyn_args)
        if node.dyn_kwargs is not None:
            node.dyn_kwargs = _guard("made", node.dyn_kwargs)
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self._searched.add(id(node.expr))
        self._searched.update(id(operand.expr) for operand in node.ops)
        self.generic_visit(node)
        node.expr = _guard("looked", node.expr, "a comparison")
        for operand in node.ops:
            searched = operand.op in ("in", "notin")
            operand.expr = _guard("looked", operand.expr, "a comparison", searched)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _guard("concat", nodes.List(node.nodes, lineno=node.lineno))

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            return node
        node.node = _guard("looked", node.node, "a slice")
        return _guard("made", node)

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:
        self.generic_visit(node)
        node.key = _guard("looked", node.key, "a key")
        return node

    def visit_List(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        return node if getattr(node, "ctx", "load") != "load" else _guard("made", node)

    visit_Dict = visit_Tuple = visit_List


def _pass_units(node: nodes.Node) -> int:
    """Return what one pass through a loop or a macro costs besides what guards charge."""
    return UNITS_PER_NODE * sum(1 for _ in node.find_all(nodes.Node))


def _without_safe(printed: nodes.Expr) -> nodes.Expr:
    """Return what is printed without `safe`, which changes nothing where nothing is escaped."""
    plain = isinstance(printed, nodes.Filter) and printed.name == "safe"
    inner: list[Any] = list(printed.iter_child_nodes())
    return inner[0] if plain and len(inner) == 1 else printed


def _unpacks_oddly(node: nodes.Node) -> bool:
    """Return whether `node` takes a value apart other than by a plain list of names."""
    targets: list[nodes.Node] = []
    if isinstance(node, nodes.Tuple) and node.ctx == "store":
        targets = list(node.items)
    elif isinstance(node, nodes.With):
        targets = list(node.targets)
    elif isinstance(node, nodes.AssignBlock) or (isinstance(node, nodes.For) and node.recursive):
        targets = [node.target]
    return any(isinstance(target, nodes.Tuple) for target in targets)


def _guard(name: str, value: Any, *args: object) -> nodes.Filter:
    constants: list[nodes.Expr] = [nodes.Const(arg, lineno=value.lineno) for arg in args]
    return nodes.Filter(value, f"~{name}", constants, [], None, None, lineno=value.lineno)
