"""What one rendering of a chat template may cost: steps of work, and bytes that it makes.

Everything is counted, nothing is timed, so the same template and messages always end the same way,
on any machine and in any thread.
"""

from __future__ import annotations

import sys
from collections.abc import ItemsView, KeysView, ValuesView
from dataclasses import dataclass
from types import NoneType

import jinja2
from jinja2.runtime import Context, Undefined

from apertus_mlx.text.template.marks import look_past

BASE_STEPS = 100_000
STEPS_PER_VALUE = 100
STEPS_PER_KIB = 16
BASE_BYTES = 16 * 2**20
BYTES_PER_VALUE = 2**10
BYTES_PER_BYTE = 32
MAX_DEPTH = 64
# What Python objects weigh besides their text, roughly.
OBJECT_BYTES = 128
POINTER_BYTES = 16
BUDGET_KEY = " budget"  # no identifier, so that a template cannot name it
SEQUENCES = (list, tuple, KeysView, ValuesView, ItemsView)
SCALARS = (bool, int, float, NoneType, Undefined)


class LimitError(jinja2.TemplateError):
    """The template asked for more than its budget."""


@dataclass(slots=True)
class Budget:
    """What one rendering may still do."""

    steps: int
    n_bytes: int

    @classmethod
    def for_input(cls, values: int, text_bytes: int) -> Budget:
        """Return the budget for messages of so many values with so much text in all."""
        return cls(
            steps=BASE_STEPS + STEPS_PER_VALUE * values + STEPS_PER_KIB * (text_bytes >> 10),
            n_bytes=BASE_BYTES + BYTES_PER_VALUE * values + BYTES_PER_BYTE * text_bytes,
        )

    def step(self, count: int = 1) -> None:
        """Charge work."""
        self.steps -= count
        if self.steps < 0:
            raise LimitError("it runs too long (the step limit)")

    def hold(self, n_bytes: int) -> None:
        """Charge memory; what was let go is not paid back."""
        self.n_bytes -= n_bytes
        if self.n_bytes < 0:
            raise LimitError("it makes too much text or data (the memory limit)")

    def text(self, text: str) -> str:
        """Charge for making `text`."""
        self.hold(sys.getsizeof(text))
        return text

    def weigh(self, value: object, doing: str | None = None) -> tuple[int, int]:
        """Charge for going through `value`; return its count of values and bytes of text.

        Data that contains the same part twice counts it twice, as printing or comparing it would.

        Args:
            value: What is gone through.
            doing: By what; a control token's text in the value is then refused, in these words.
        """
        count = text_bytes = 0
        level = [value]
        for depth in range(MAX_DEPTH):
            inner: list[object] = []
            for item in level:
                if isinstance(item, str):
                    size = sys.getsizeof(item)
                    text_bytes += size
                    self.step(size >> 10)
                    if doing is not None:
                        look_past(item, doing)
                elif isinstance(item, SEQUENCES):
                    self.step(len(item))
                    inner.extend(item)
                elif isinstance(item, dict):
                    self.step(2 * len(item))
                    inner.extend(item.keys())
                    inner.extend(item.values())
                elif isinstance(item, range):
                    self.step(len(item) >> 2)
                elif depth and not isinstance(item, SCALARS):
                    raise LimitError(f"it puts a {type(item).__name__} into a list")
            count += len(level)
            if not inner:
                self.step(1 + (count >> 3))
                return count, text_bytes
            level = inner
        raise LimitError(f"it nests data more than {MAX_DEPTH} deep")


def budget_of(context: Context) -> Budget:
    """Return the budget of the rendering that `context` belongs to."""
    budget: Budget = context.parent[BUDGET_KEY]
    return budget
