"""How much the Swift tests compare: a part each day, all of it where `APERTUS_NIGHTLY` is set."""

from __future__ import annotations

import os

NIGHTLY = bool(os.environ.get("APERTUS_NIGHTLY"))


def sized(nightly: int, daily: int) -> int:
    """The first number at night, else the second."""
    return nightly if NIGHTLY else daily
