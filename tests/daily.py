"""Which cases of a long table run every day; the nightly job runs them all."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def every(step: int, cases: Iterable[Any]) -> list[Any]:
    """`cases` as parameters of a test, of which those at multiples of `step` run every day."""
    return every_row(step, ((case,) for case in cases))


def every_row(step: int, rows: Iterable[tuple[Any, ...]]) -> list[Any]:
    """The same for a test of several parameters: a row has a value for each."""
    return [
        pytest.param(*row, marks=[pytest.mark.nightly] if i % step else [])
        for i, row in enumerate(rows)
    ]
