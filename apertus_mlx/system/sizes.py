"""Sizes and counts as people read them."""

from __future__ import annotations


def format_bytes(size_bytes: float, *, round_up: bool = False) -> str:
    """Bytes in decimal units, as disks and app stores count them.

    `round_up` is for what something needs: a limit of the size that is shown then suffices.
    """
    size = abs(size_bytes)
    unit, scale, digits = ("kB", 10**3, 1) if size < 10**6 else ("MB", 10**6, 1)
    if size < 1000:
        unit, scale, digits = "B", 1, 0
    elif size >= 10**9:
        unit, scale, digits = "GB", 10**9, 2
    if round_up:
        step = scale // 10**digits
        size_bytes = -(-size_bytes // step) * step
    return f"{size_bytes / scale:.{digits}f} {unit}"


def format_binary(size_bytes: int) -> str:
    """A size that is given in binary units, as the memory of a device or a limit: `16 GiB`."""
    unit, scale = ("GiB", 2**30) if size_bytes >= 2**30 else ("MiB", 2**20)
    return f"{size_bytes / scale:.0f} {unit}"


def format_parameters(count: int) -> str:
    """How many weights a model has: `438 M`, `8.05 B`."""
    return f"{count / 10**6:.0f} M" if count < 10**9 else f"{count / 10**9:.2f} B"


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """`1 value`, `2 values`, `1,024 tokens`; `plural` where it is not the noun and an s."""
    return f"{count:,} {noun if count == 1 else plural or f'{noun}s'}"
