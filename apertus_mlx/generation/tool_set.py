"""The tools of one request: what the model is told of them, and which can be called here."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from apertus_mlx.generation.function_tools import call_function, tool_schema
from apertus_mlx.generation.tool_grammar import ToolGrammar
from apertus_mlx.system.arguments import expect
from apertus_mlx.text.pieces import ToolCall
from apertus_mlx.text.tool_definitions import read_tools

_log = logging.getLogger(__name__)

# A definition as OpenAI's API takes it, or a function.
Tool = Mapping[str, object] | Callable[..., Any]


@dataclass(frozen=True)
class ToolSet:
    """Tools, and whether the model may or must call them.

    Attributes:
        definitions: what the chat template is given, each `{name, description, parameters}`.
        functions: those that are Python functions, by name.
        choice: `auto`, `none`, `required`, or the name of the tool that has to be called.
    """

    definitions: list[dict[str, Any]] = field(default_factory=list)
    functions: dict[str, Callable[..., Any]] = field(default_factory=dict)
    choice: str = "auto"

    @property
    def names(self) -> list[str] | None:
        """The tools whose calls may come without control tokens; None if none may come."""
        return [each["name"] for each in self.definitions] if self.choice != "none" else None

    @cached_property
    def grammar(self) -> ToolGrammar | None:
        """What keeps calls to their schemas, compiled once; None without tools."""
        return ToolGrammar(self.definitions, self.choice) if self.definitions else None

    @cached_property
    def after_results(self) -> ToolSet:
        """The same tools where none has to be called any more."""
        return self if self.choice in ("none", "auto") else replace(self, choice="auto")

    def can_call(self, calls: Sequence[ToolCall]) -> bool:
        """Whether `answer` knows what to say to all of these: none is for the caller to do."""
        names = {each["name"] for each in self.definitions} - set(self.functions)
        return not any(call.name in names for call in calls)

    def answer(self, call: ToolCall) -> str:
        """Call a function; returns its result as text, or what went wrong, for the model."""
        function = self.functions.get(call.name)
        if function is None:
            return (
                f"error: there is no tool {call.name[:64]}; there are {', '.join(self.functions)}"
            )
        try:
            return call_function(function, call.arguments)
        except Exception as error:  # noqa: BLE001  (any that the function raises)
            _log.warning("the tool %s failed", call.name, exc_info=error)
            known = type(error).__module__.startswith("apertus_mlx.")
            return f"error: {error}" if known else f"error: {type(error).__name__}: {error}"


def read_tool_set(tools: Sequence[Tool] | None, choice: str = "auto") -> ToolSet:
    """The tools of a request, checked.

    Raises:
        TypeError: a tool that is neither a function nor an object, or values of a wrong type.
        UsageError: a definition that no prompt can be made of, a function that cannot be a tool,
            two of one name, or a choice that cannot be.
    """
    expect(Sequence[object] | None, tools=tools)
    expect(str, tool_choice=choice)
    functions = {}
    definitions: list[Any] = []
    for tool in tools or ():
        if callable(tool):
            definition = tool_schema(tool)
            functions[definition["function"]["name"]] = tool
            tool = definition  # noqa: PLW2901
        definitions.append(tool)
    found = ToolSet(read_tools(definitions), functions, choice)
    if found.choice != "auto":
        ToolGrammar(found.definitions, found.choice)  # refuses one that there is not
    return found
