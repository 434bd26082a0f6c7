"""What one rendering of a chat template may cost, in one currency for work and memory.

A unit is roughly a byte. Nothing is timed and nothing is paid back, so the same template and
messages end the same way on every machine.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextvars import ContextVar
from types import NoneType
from typing import TypeVar

import jinja2
from jinja2.runtime import Undefined

BASE_UNITS = 16 * 2**20
UNITS_PER_TEXT = 4096
UNITS_PER_BYTE = 32
STEP = 128  # a call, filter, test or operator
ITEM = 80  # an item of a list
_NO_PARTS = (bool, int, float, NoneType, Undefined, Iterator)
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


def charged(items: Iterable[_T], units: int = ITEM) -> Iterator[_T]:
    """Yield `items`, charging for each before it is used."""
    for item in items:
        spend(units)
        yield item


def weigh(*values: object) -> int:
    """Charge for going through data, shared parts as often as they occur; return their bytes."""
    size = 0
    for value in values:
        if isinstance(value, Collection):
            units = sys.getsizeof(value) if isinstance(value, str) else ITEM * (1 + len(value))
            spend(units)
            size += units
            if not isinstance(value, str):
                size += weigh(*value)
            if isinstance(value, Mapping):
                size += weigh(*value.values())
        elif not isinstance(value, _NO_PARTS):
            raise LimitError(f"it takes a {type(value).__name__} for data")
    return size
