"""The options with which a model is given tools."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from apertus_mlx.cli.sink import note
from apertus_mlx.system.arguments import Option

if TYPE_CHECKING:
    from apertus_mlx.generation.tool_set import ToolSet

ToolsOption = Annotated[
    Path | None,
    Option("Tools that the model may call: JSON as OpenAI's API takes it.", metavar="FILE"),
]
ToolChoiceOption = Annotated[
    str,
    Option(
        "auto, none, required, or the name of the tool that has to be called.",
        metavar="CHOICE",
    ),
]


def read_tool_options(tools: Path | None, choice: str) -> ToolSet:
    """The tools of a command; tells of those whose arguments cannot be held to their schema.

    Raises:
        NotFoundError, RejectedError: see `request_files.read_tools`.
        UsageError: there is no such tool to choose, or no engine for the choice.
    """
    from apertus_mlx.generation import request_files
    from apertus_mlx.generation.tool_set import read_tool_set

    found = read_tool_set(None if tools is None else request_files.read_tools(tools), choice)
    if found.grammar is not None:
        for reason in found.grammar.loose.values():
            note(f"{reason}; its arguments may be any object")
    return found
