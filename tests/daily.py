"""Which cases of a long table run every day; the nightly job runs them all."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def every(step: int, cases: Iterable[Any]) -> list[Any]:
    """`cases` as parameters of a test, of which those at multiples of `step` run every day."""
    return [
        case if i % step == 0 else pytest.param(case, marks=pytest.mark.nightly)
        for i, case in enumerate(cases)
    ]
