"""Run the Apertus language models with MLX. Importing this package loads nothing heavy."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from apertus_mlx.tools import convert_model, distill, evaluate, plan, verify

__version__ = "0.1.0"
# name -> the module that defines it; imported when it is first asked for.
_HOMES = dict.fromkeys(
    ("convert_model", "distill", "evaluate", "plan", "verify"), "apertus_mlx.tools"
)
__all__ = ["__version__", "convert_model", "distill", "evaluate", "plan", "verify"]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
