"""Rewrites a parsed chat template so that each of its operations has a price.

Jinja runs loops, comparisons, slices, literals and `~` itself. Here each gets a guard: a filter of
the sandbox, harmless if a template names it. Syntax that no chat template needs is refused.
"""

from __future__ import annotations

from typing import Any

import jinja2.nodes as nodes
from jinja2.exceptions import SecurityError
from jinja2.visitor import NodeTransformer

from apertus_mlx.text.template.budget import LimitError

MAX_NODES = 8_000
_STATEMENTS = (
    *(nodes.Assign, nodes.AssignBlock, nodes.Break, nodes.CallBlock, nodes.Continue, nodes.For),
    *(nodes.FilterBlock, nodes.If, nodes.Macro, nodes.Output, nodes.Scope, nodes.With),
)
# Their first argument is a text to look for in a message, rather than one to write.
_SEARCHES = frozenset(("endswith", "lstrip", "replace", "rstrip", "split", "startswith", "strip"))


def rewrite_template(tree: nodes.Template) -> tuple[list[str], int]:
    """Put guards into `tree`.

    Returns:
        The texts that the template writes, into which a guard `~text` has an index, and how many
        parts the template has.

    Raises:
        jinja2.TemplateError: it is too large, or uses a feature that is missing here.
    """
    guards = _Guards()
    guards.visit(tree)
    return guards.texts, guards.size


class _Guards(NodeTransformer):
    def __init__(self) -> None:
        self.texts: list[str] = []
        self.size = 0

    def visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> Any:
        self.size += 1
        if self.size > MAX_NODES:
            raise LimitError(f"it has more than {MAX_NODES} parts")
        unknown = isinstance(node, nodes.Stmt) and not isinstance(node, _STATEMENTS)
        if unknown or isinstance(node, nodes.Pow):
            raise SecurityError(
                f"line {node.lineno}: {type(node).__name__} is not available to chat templates"
            )
        return super().visit(node, *args, **kwargs)

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:
        return self.visit_Const(nodes.Const(node.data, lineno=node.lineno))

    def visit_Const(self, node: nodes.Const) -> nodes.Node:
        if not isinstance(node.value, str):
            return node
        self.texts.append(node.value)
        return _guard("~text", nodes.Const(len(self.texts) - 1, lineno=node.lineno))

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _guard("~iterate", node.iter)
        return node

    def visit_Call(self, node: Any) -> Any:
        name = node.name if isinstance(node, nodes.Filter) else getattr(node.node, "attr", "")
        first = node.args[:1] if name in _SEARCHES else []
        searched = [each for each in first if isinstance(each, nodes.Const)]
        node.args = node.args[len(searched) :]
        self.generic_visit(node)
        node.args = searched + node.args
        return node

    visit_Filter = visit_Call

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        compared: list[Any] = [node, *node.ops]
        for each in compared:
            # A constant is a text to look for.
            expr = each.expr if isinstance(each.expr, nodes.Const) else self.visit(each.expr)
            each.expr = _guard("~weigh", expr)
        return node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:
        self.generic_visit(node)
        node.key = _guard("~weigh", node.key)  # it is hashed
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _guard("join", nodes.List(node.nodes, lineno=node.lineno))

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            node.node = _guard("~weigh", node.node)
        return node

    def visit_List(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        return node if getattr(node, "ctx", "load") != "load" else _guard("~weigh", node)

    visit_Dict = visit_Tuple = visit_List


def _guard(name: str, value: Any) -> nodes.Filter:
    return nodes.Filter(value, name, [], [], None, None, lineno=value.lineno)
