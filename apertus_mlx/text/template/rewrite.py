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
    size = 0
    for node in tree.find_all(nodes.Node):
        size += 1
        if size > MAX_NODES:
            raise LimitError(f"it has more than {MAX_NODES} parts")
        if _is_missing(node):
            raise SecurityError(
                f"line {node.lineno}: {type(node).__name__} is not available to chat templates"
            )
    guards = _Guards()
    guards.visit(tree)
    return guards.texts, size


class _Guards(NodeTransformer):
    def __init__(self) -> None:
        self.texts: list[str] = []
        self._searched: dict[int, nodes.Node] = {}  # held, for ids to stay theirs

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:
        return self.visit_Const(nodes.Const(node.data, lineno=node.lineno))

    def visit_Const(self, node: nodes.Const) -> nodes.Node:
        if not isinstance(node.value, str) or id(node) in self._searched:
            return node
        self.texts.append(node.value)
        return _guard("text", nodes.Const(len(self.texts) - 1, lineno=node.lineno))

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _guard("iterate", node.iter)
        return node

    def visit_Call(self, node: Any) -> nodes.Node:
        name = node.name if isinstance(node, nodes.Filter) else getattr(node.node, "attr", "")
        if name in _SEARCHES:
            self._searched.update((id(argument), argument) for argument in node.args[:1])
        return self.generic_visit(node)

    visit_Filter = visit_Call

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        compared: list[Any] = [node, *node.ops]
        self._searched.update((id(each.expr), each.expr) for each in compared)
        self.generic_visit(node)
        for each in compared:
            each.expr = _guard("weighed", each.expr)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _guard("concat", nodes.List(node.nodes, lineno=node.lineno))

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            return node
        node.node = _guard("weighed", node.node)
        return _guard("made", node)

    def visit_List(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        return node if getattr(node, "ctx", "load") != "load" else _guard("made", node)

    visit_Dict = visit_Tuple = visit_List


def _is_missing(node: nodes.Node) -> bool:
    if isinstance(node, nodes.Call | nodes.Filter | nodes.Test):
        return node.dyn_args is not None or node.dyn_kwargs is not None
    if isinstance(node, nodes.Pair):  # other keys are slow to hash
        return not isinstance(node.key, nodes.Const)
    return (
        isinstance(node, nodes.Pow)
        or (isinstance(node, nodes.For) and node.recursive)
        or (isinstance(node, nodes.Stmt) and not isinstance(node, _STATEMENTS))
    )


def _guard(name: str, value: Any) -> nodes.Filter:
    return nodes.Filter(value, f"~{name}", [], [], None, None, lineno=value.lineno)
