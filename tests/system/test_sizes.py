"""Sizes as people read them."""

from __future__ import annotations

import ast
import re
from itertools import pairwise

import pytest

from apertus_mlx.memory import parse_size
from apertus_mlx.system.sizes import counted, format_binary, format_bytes, format_parameters
from tests.house.test_house import MODULES

UNIT = re.compile(r"\s?([kKMGT]i?)?B\b(?!/)")
# Names, as `parse_size` and `parse_device` read them.
BY_HAND = {"apertus_mlx.convert.plan.policy", "apertus_mlx.memory.devices"}


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


def test_nobody_formats_sizes_by_hand() -> None:
    """No text has a unit of bytes right behind a number that is put into it."""
    found = set()
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            parts = node.values if isinstance(node, ast.JoinedStr) else []
            for number, text in pairwise(parts):
                is_number = isinstance(number, ast.FormattedValue)
                if is_number and isinstance(text, ast.Constant) and UNIT.match(text.value):
                    found.add(name)
    assert found - {"apertus_mlx.system.sizes"} == BY_HAND


def test_counts_and_memory() -> None:
    assert [counted(n, "value") for n in (0, 1, 2)] == ["0 values", "1 value", "2 values"]
    assert [counted(n, "matrix", "matrices") for n in (1, 1200)] == ["1 matrix", "1,200 matrices"]
    assert [format_parameters(n) for n in (2_820_864, 8_053_338_176)] == ["3 M", "8.05 B"]
    assert [format_binary(n * 2**20) for n in (64, 16 * 1024)] == ["64 MiB", "16 GiB"]
