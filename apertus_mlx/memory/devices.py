"""Apple devices: memory that one process may use, and memory bandwidth.

Apple publishes no table of the memory. People measured (RAM of the device -> what an app got, with
the increased-memory-limit entitlement): 4 GB -> 2.4 (allenai/OLMoE.swift#38), 6 GB -> 4.2
(pocketpal-ai#651), 8 GB -> 6 (introlab/rtabmap#1446, mlx-swift-lm#343); 12 GB phones are killed
well below 12 (boardsesh#5524). The plan keeps below all of them. Macs: Metal recommends a working
set of 2/3 of the RAM up to 32 GB (21,845 MB of 32 GB) and more above (40,200 MB of 48 GB).
Bandwidth: Apple's figures as published in the press; A17 Pro, A18, M1, M2 and M3 from memory.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from apertus_mlx.errors import UsageError

GB = 10**9
# Shares of a Mac's RAM that one process may use.
SMALL_MAC_SHARE, LARGE_MAC_SHARE, LARGE_MAC_GB = 2 / 3, 3 / 4, 36

# name -> (GB that an app may use, GB/s)
PHONES: dict[str, tuple[float, float | None]] = {
    "iphone-12-mini": (2.0, None), "iphone-13-pro": (3.8, None), "iphone-15": (3.8, 51.2),
    "iphone-15-pro": (5.5, 51.2), "iphone-16": (5.5, 60.0), "iphone-16-pro": (5.5, 60.0),
    "iphone-17": (5.5, 68.3), "iphone-air": (8.0, 75.8), "iphone-17-pro": (8.0, 75.8),
}  # fmt: skip
# Chip -> GB/s; a Mac is named by chip and RAM: m1-8gb, m4-pro-24gb. M4 Max with 40 GPU cores; the
# one with 32 has 410. M3 Max is left out: its two kinds have 300 and 400.
CHIPS: dict[str, float] = {
    "m1": 68.0, "m1-pro": 200.0, "m1-max": 400.0, "m1-ultra": 800.0,
    "m2": 100.0, "m2-pro": 200.0, "m2-max": 400.0, "m2-ultra": 800.0,
    "m3": 100.0, "m3-pro": 150.0, "m3-ultra": 819.0,
    "m4": 120.0, "m4-pro": 273.0, "m4-max": 546.0,
    "m5": 153.0,
}  # fmt: skip
UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": GB, "tb": 10**12,
         "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Device:
    """A machine as the planner sees it; `bandwidth` in bytes per second, None where unknown."""

    name: str
    memory_bytes: int
    bandwidth: float | None = None


def parse_device(text: str) -> Device:
    """A device by name, or one that gives a process so much memory.

    Raises:
        UsageError: neither a known name nor a size.
    """
    name = text.strip().lower()
    if name in PHONES:
        memory_gb, bandwidth_gb = PHONES[name]
        return Device(name, int(memory_gb * GB), bandwidth_gb and bandwidth_gb * GB)
    mac = re.fullmatch(r"(m\d(?:-(?:pro|max|ultra))?)-(\d{1,4})gb", name)
    if mac and mac[1] in CHIPS:
        # RAM is sold in binary units.
        ram_gib = int(mac[2])
        share = SMALL_MAC_SHARE if ram_gib < LARGE_MAC_GB else LARGE_MAC_SHARE
        return Device(name, int(ram_gib * 2**30 * share), CHIPS[mac[1]] * GB)
    if re.match(r"[\d.]", name):
        return Device(text.strip(), parse_size(text, "--device"))
    raise UsageError(
        f"--device {text[:40]!r}: unknown; phones: {', '.join(PHONES)}; Macs: chip and memory as "
        f"m1-8gb (chips {', '.join(CHIPS)}); or a size as 6GB"
    )


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
