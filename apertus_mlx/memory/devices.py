"""Apple devices: memory that one process may use, and memory bandwidth.

`apple_devices.json` holds every iPhone and iPad whose GPU MLX can use (Apple's family 7, from A14
and M1 on; all of them run iOS 17) and every Mac with an M1 to M5, each figure with its source.
Apple publishes no table of the memory that an app gets: the plan stays below what people measured
with the increased-memory-limit entitlement.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from apertus_mlx.errors import UsageError

GB = 10**9
# Shares of a Mac's RAM that one process may use; the table's source `metal` says why.
SMALL_MAC_SHARE, LARGE_MAC_SHARE, LARGE_MAC_GB = 2 / 3, 3 / 4, 36
UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": GB, "tb": 10**12,
         "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}  # fmt: skip
# Of a device's name: what says nothing, and the Mac that a chip is in.
_NOISE = re.compile(r"\b(apple|generation|gen|chip|bionic|ram|memory|with)\b")
_SCREEN = re.compile(r"\b(11|12\.9|13|14|15|16)[ -]?(inch|in)\b")
_MAC = re.compile(r"^(macbookair|macbookpro|macmini|macstudio|macpro|imac)(?=m\d)")
_log = logging.getLogger("apertus_mlx")


@dataclass(frozen=True, slots=True)
class Device:
    """A machine as the planner sees it.

    Attributes:
        memory_bytes: what one process may use.
        bandwidth: of the memory, in bytes per second; None where unknown.
        chip: its name; None for a machine that is only a size.
        ram_bytes: of the whole device.
        ram_source: where `ram_bytes` is from, and so on for the others.
        is_card: whether it is a GPU with memory of its own.
    """

    name: str
    memory_bytes: int
    bandwidth: float | None = None
    chip: str | None = None
    ram_bytes: int | None = None
    ram_source: str | None = None
    memory_source: str | None = None
    bandwidth_source: str | None = None
    is_card: bool = False


def known_devices() -> list[Device]:
    """All of the table, in its order: a device with several sizes of memory once for each."""
    return [device for _, device in _rows()]


def is_all(name: str | None) -> bool:
    """Whether a `--device` means every one of them."""
    return name is not None and name.strip().lower() == "all"


def parse_device(text: str) -> Device:
    """A device by name, or one that gives a process so much memory.

    Case, spaces and hyphens do not matter: `iphone-15-pro`, `iPhone 15 Pro`, `M3 Max 48GB`. Without
    a memory it is the smallest that there is.

    Raises:
        UsageError: neither a known name nor a size.
    """
    key, names = _key(text), _names()
    if key in names:
        found = names[key]
        if len(found) > 1:
            others = ", ".join(each.name for each in found[1:])
            _log.info(f"{text.strip()}: taken as {found[0].name}; with more memory: {others}")
        return found[0]
    if re.match(r"[\d.]", text.strip()):
        return Device(text.strip(), parse_size(text, "--device"))
    if key in {_key(name) for name in _table()["too_old"]}:
        raise UsageError(
            f"--device {text[:40]!r}: MLX needs Apple's GPU family 7 (A14, M1 and later), which "
            f"this device does not have"
        )
    near = [names[each][0].name for each in get_close_matches(key, names, 3, 0.7)]
    meant = f"the nearest are {', '.join(dict.fromkeys(near))}; " if near else ""
    raise UsageError(
        f"--device {text[:40]!r}: is no known device; {meant}apertus-mlx plan --device all lists "
        f"them, or give a size as 6GB"
    )


def published_bandwidth(chip: str, ram_bytes: int | None = None) -> float | None:
    """Bytes per second of a Mac's chip by the name that Metal gives it, as `Apple M4 Pro`.

    None for an unknown chip, and for one of two kinds where `ram_bytes` does not tell which.
    """
    maker, _, name = chip.partition(" ")
    kinds = [
        device
        for row, device in _rows()
        if row["name"] == name and maker == "Apple" and not _is_mobile(name)
    ]
    fitting = {each.bandwidth for each in kinds if each.ram_bytes == ram_bytes}
    found = fitting or {each.bandwidth for each in kinds}
    return found.pop() if len(found) == 1 else None


def parse_size(text: str, option: str) -> int:
    """Bytes of a size as `1.2GB`, `800 MB` or `2GiB`; `option` is what error messages call it.

    Raises:
        UsageError: no such size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+)\s*([a-z]*)", text.strip().lower())
    if match and match[2] in UNITS and len(match[1]) <= 20:
        size = float(match[1]) * UNITS[match[2]]
        if 1 <= size < 2**60:
            return int(size)
    raise UsageError(f"{option} {text[:40]!r}: expected a size as 1.2GB, 800MB or 2GiB")


@cache
def _table() -> dict[str, Any]:
    text = Path(__file__).with_name("apple_devices.json").read_text("utf-8")
    return json.loads(text)  # type: ignore[no-any-return]


@cache
def _rows() -> list[tuple[dict[str, Any], Device]]:
    return list(_read_rows())


def _read_rows() -> Iterator[tuple[dict[str, Any], Device]]:
    table = _table()
    sources, chips = table["sources"], {chip["name"]: chip for chip in table["chips"]}
    allowed = {each["ram_gb"]: each for each in table["process_memory"]}
    for row in table["devices"]:
        chip, mobile = chips[row["chip"]], _is_mobile(row["name"])
        for ram_gb in row["ram_gb"]:
            # RAM is sold in binary units.
            ram_bytes = ram_gb * 2**30
            share = SMALL_MAC_SHARE if ram_gb < LARGE_MAC_GB else LARGE_MAC_SHARE
            memory = allowed[ram_gb]["process_gb"] * GB if mobile else ram_bytes * share
            process_source = allowed[ram_gb]["source"] if mobile else "metal"
            name = row["name"].lower().replace(" ", "-")
            if len(row["ram_gb"]) > 1 or re.match(r"m\d", name):
                name += f"-{ram_gb}gb"
            cited = (sources[key] for key in (row["source"], process_source, chip["source"]))
            bandwidth = chip["gb_per_s"] * GB
            yield row, Device(name, int(memory), bandwidth, row["chip"], ram_bytes, *cited)


@cache
def _names() -> dict[str, list[Device]]:
    """Everything that a device answers to; several devices differ in memory, the least first."""
    names: dict[str, list[Device]] = {}
    for row, device in _rows():
        for name in (row["name"], *row.get("also", ())):
            ram_gb = (device.ram_bytes or 0) // 2**30
            names.setdefault(_key(name), []).append(device)
            names[_key(f"{name} {ram_gb}GB")] = [device]
    return {
        name: sorted(found, key=lambda each: each.ram_bytes or 0) for name, found in names.items()
    }


def _is_mobile(name: str) -> bool:
    return name.startswith(("iPhone", "iPad"))


def _key(text: str) -> str:
    """A name without what people write differently: case, spaces, hyphens, the screen's size."""
    name = re.sub(r"[^a-z0-9.]+", " ", text.lower())
    name = _SCREEN.sub(" ", re.sub(r"\b(\d+)(st|nd|rd|th)\b", r"\1", name))
    return _MAC.sub("", _NOISE.sub(" ", name).replace(" ", ""))
