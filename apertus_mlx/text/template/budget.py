"""What one rendering of a chat template may cost, in one currency for work and memory.

A unit is roughly a byte. Nothing is timed and nothing is paid back, so the same template and
messages end the same way on every machine.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from contextvars import ContextVar
from types import NoneType
from typing import TypeVar

import jinja2
from jinja2.runtime import Undefined

from apertus_mlx.text.template.control_text import ControlText

BASE_UNITS = 16 * 2**20
UNITS_PER_TEXT = 4096
UNITS_PER_BYTE = 32
STEP = 128  # a call, filter, test or operator
ITEM = 80  # an item of a list
MAX_DEPTH = 64
MAX_INTEGER_BITS = 256
_SCALARS = (bool, int, float, NoneType, Undefined)
_LEFT: ContextVar[list[int]] = ContextVar("left")
_T = TypeVar("_T")


class LimitError(jinja2.TemplateError):
    """The template asked for more than it may have."""


def start_rendering(data: str) -> None:
    """Give the rendering that starts in this thread what messages need that are `data` in JSON."""
    texts = data.count('"') // 2
    _LEFT.set([BASE_UNITS + UNITS_PER_TEXT * texts + UNITS_PER_BYTE * sys.getsizeof(data)])


def spend(units: int = STEP) -> None:
    """Charge the rendering that runs."""
    left = _LEFT.get()
    left[0] -= units
    if left[0] < 0:
        raise LimitError("it takes too much work or memory")


def made(value: _T) -> _T:
    """Charge for `value`, which was just made; its parts were there before."""
    if isinstance(value, int) and value.bit_length() > MAX_INTEGER_BITS:
        raise LimitError("it makes a very large number")
    spend(value.size if isinstance(value, ControlText) else sys.getsizeof(value))
    if isinstance(value, list | tuple | dict):
        spend(ITEM * len(value))
    return value


def weigh(value: object) -> int:
    """Charge for going through `value`, shared parts as often as they occur; return its bytes."""
    size = 0
    level = [value]
    for depth in range(MAX_DEPTH):
        inner: list[object] = []
        for item in level:
            if isinstance(item, ControlText):
                size += item.size
            elif isinstance(item, str):
                size += sys.getsizeof(item)
            elif isinstance(item, Collection):
                spend(ITEM * len(item))
                size += ITEM * len(item)
                inner += item
                inner += item.values() if isinstance(item, Mapping) else ()
            elif depth and not isinstance(item, _SCALARS):
                raise LimitError(f"it puts a {type(item).__name__} into a list")
        level = inner
        if not level:
            spend(size >> 1)
            return size
    raise LimitError(f"it nests data more than {MAX_DEPTH} deep")
