"""Rewrites a parsed chat template so that the sandbox can charge for everything in it.

Jinja runs loops, comparisons, slices, literals and `~` itself. Here each becomes a call of one of
`SandboxEnvironment`'s guards. Kinds of statements that no chat template needs are refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jinja2.nodes as nodes
from jinja2.exceptions import SecurityError
from jinja2.visitor import NodeTransformer

from apertus_mlx.text.template.budget import LimitError

MAX_NODES = 8_000
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
        if not isinstance(node, _ALLOWED_NODES) or _unpacks_oddly(node):
            raise SecurityError(
                f"line {node.lineno}: {type(node).__name__} is not available to chat templates"
            )
    rewritten: nodes.Template = _Charge(constant).visit(tree)
    return rewritten


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

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        node.nodes = [_without_safe(part) for part in node.nodes]
        return self.generic_visit(node)

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        unpacks = nodes.Const(isinstance(node.target, nodes.Tuple), lineno=node.lineno)
        node.iter = _guard("guard_iterate", [node.iter, unpacks], node.lineno)
        tick = _guard("guard_pass", [], node.lineno)
        node.body.insert(0, nodes.ExprStmt(tick, lineno=node.lineno))
        if node.test is not None:
            node.test = nodes.And(tick, node.test, lineno=node.lineno)
        return node

    def visit_Assign(self, node: nodes.Assign) -> nodes.Node:
        self.generic_visit(node)
        if isinstance(node.target, nodes.Tuple):
            no = nodes.Const(False, lineno=node.lineno)
            node.node = _guard("guard_iterate", [node.node, no], node.lineno)
        return node

    def visit_Filter(self, node: nodes.Filter) -> nodes.Node:
        if node.name == "replace":
            self._searched.update(id(argument) for argument in node.args[:1])
        return self.generic_visit(node)

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


def _without_safe(printed: nodes.Expr) -> nodes.Expr:
    """Return what is printed without `safe`, which changes nothing where nothing is escaped."""
    if isinstance(printed, nodes.Filter) and printed.name == "safe":
        arguments = [*printed.args, *printed.kwargs, printed.dyn_args, printed.dyn_kwargs]
        if printed.node is not None and not any(arguments):
            return printed.node
    return printed


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


def _guard(name: str, arguments: list[Any], line: int) -> nodes.Call:
    function = nodes.EnvironmentAttribute(name, lineno=line)
    return nodes.Call(function, arguments, [], None, None, lineno=line)
