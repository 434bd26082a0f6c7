"""What one rendering of a chat template may cost, in one currency for work and memory.

A unit is roughly a byte made or two bytes read. Nothing is timed and nothing is paid back, so the
same template and messages end the same way on every machine.
"""

from __future__ import annotations

import sys
from collections.abc import ItemsView, Iterable, KeysView, ValuesView
from contextvars import ContextVar
from types import NoneType
from typing import TypeVar

import jinja2
from jinja2.runtime import Undefined

from apertus_mlx.text.template.marks import look_past

BASE_UNITS = 16 * 2**20
UNITS_PER_TEXT = 4096
UNITS_PER_BYTE = 32
STEP = 128  # one pass, call, filter, test or operator
MAX_DEPTH = 64
MAX_INTEGER_BITS = 256
VALUE_BYTES = 64  # a value besides its text
_SCALARS = (bool, int, float, NoneType, Undefined)
_LEFT: ContextVar[list[int]] = ContextVar("left")
_T = TypeVar("_T")


class LimitError(jinja2.TemplateError):
    """The template asked for more than it may have."""


def start_rendering(texts: Iterable[str]) -> None:
    """Give the rendering that starts in this thread what messages with these texts need."""
    sizes = (UNITS_PER_TEXT + UNITS_PER_BYTE * sys.getsizeof(text) for text in texts)
    _LEFT.set([BASE_UNITS + sum(sizes)])


def spend(units: int = STEP) -> None:
    """Charge the rendering that runs; nothing a template computes can pay back."""
    left = _LEFT.get()
    left[0] -= max(units, 0)
    if left[0] < 0:
        raise LimitError("it takes too much work or memory")


def made(value: _T) -> _T:
    """Charge for `value`, which was just made; its parts were there before."""
    if isinstance(value, int) and value.bit_length() > MAX_INTEGER_BITS:
        raise LimitError("it makes a very large number")
    spend(sys.getsizeof(value))
    return value


def weigh(value: object, doing: str | None = None) -> int:
    """Charge for going through `value`; return its bytes.

    Data that contains the same part twice counts it twice, as printing or comparing it would.

    Args:
        value: What is gone through.
        doing: By what; a control token's text in the value is then refused, in these words.
    """
    size = 0
    level = [value]
    for depth in range(MAX_DEPTH):
        inner: list[object] = []
        size += VALUE_BYTES * len(level)
        for item in level:
            if isinstance(item, str):
                size += sys.getsizeof(item)
                if doing is not None:
                    look_past(item, doing)
            elif isinstance(item, dict):
                spend(64 * len(item))
                inner += [*item.keys(), *item.values()]
            elif isinstance(item, list | tuple | KeysView | ValuesView | ItemsView):
                spend(32 * len(item))
                inner += item
            elif isinstance(item, range):
                size += VALUE_BYTES * len(item)
            elif depth and not isinstance(item, _SCALARS):
                raise LimitError(f"it puts a {type(item).__name__} into a list")
        if not inner:
            spend(size >> 1)
            return size
        level = inner
    raise LimitError(f"it nests data more than {MAX_DEPTH} deep")
