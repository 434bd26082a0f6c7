"""Sizes as people read them."""

from __future__ import annotations

import pytest

from apertus_mlx.memory import parse_size
from apertus_mlx.system.sizes import format_bytes


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (999_900, "999.9 kB"),
        (364_300_000, "364.3 MB"),
        (10**9, "1.00 GB"),
        (8_589_934_592, "8.59 GB"),
        (1.5e6, "1.5 MB"),
        (-2500, "-2.5 kB"),
    ],
)
def test_decimal_units(size_bytes: float, text: str) -> None:
    assert format_bytes(size_bytes) == text


def test_a_size_that_is_needed_is_never_shown_smaller() -> None:
    assert format_bytes(364_300_000, round_up=True) == "364.3 MB"
    assert format_bytes(364_300_001, round_up=True) == "364.4 MB"
    for size_bytes in (1, 1001, 123_456, 99_999_999, 1_000_000_001, 5_555_555_555):
        shown = parse_size(format_bytes(size_bytes, round_up=True), "--memory-limit")
        assert size_bytes <= shown <= size_bytes * 1.1
