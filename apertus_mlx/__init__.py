"""Run and quantize the Apertus language models with MLX; see docs/python.md.

Importing this package loads nothing heavy: what it offers comes when it is first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from apertus_mlx.api import Answer, Apertus, Chat, Message, Piece, Stream, ToolCall, load
    from apertus_mlx.errors import (
        ApertusError,
        NotFoundError,
        RejectedError,
        ResourceError,
        UsageError,
    )
    from apertus_mlx.generation.function_tools import tool_schema
    from apertus_mlx.system.progress import Progress
    from apertus_mlx.tools import (
        convert_model,
        distill,
        evaluate,
        evaluate_tasks,
        plan,
        plan_overview,
        verify,
    )

__version__ = "0.1.0"

_NAMES = {
    "api": ("Answer", "Apertus", "Chat", "Message", "Piece", "Stream", "ToolCall", "load"),
    "errors": ("ApertusError", "NotFoundError", "RejectedError", "ResourceError", "UsageError"),
    "generation.function_tools": ("tool_schema",),
    "system.progress": ("Progress",),
    "tools": (
        *("convert_model", "distill", "evaluate", "evaluate_tasks", "plan", "plan_overview"),
        "verify",
    ),
}
# name -> the module that defines it.
_HOMES = {name: f"{__name__}.{module}" for module, names in _NAMES.items() for name in names}
__all__ = [
    "Answer", "Apertus", "ApertusError", "Chat", "Message", "NotFoundError", "Piece", "Progress",
    "RejectedError", "ResourceError", "Stream", "ToolCall", "UsageError", "__version__",
    "convert_model", "distill", "evaluate", "evaluate_tasks", "load", "plan", "plan_overview",
    "tool_schema", "verify",
]  # fmt: skip


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
