"""README's table of released models: download, memory, and the smallest iPhone and Mac for each.

    python -m benchmarks.released_models

All of it is computed from the models' shapes, as `apertus-mlx models` and `apertus-mlx plan --all`
do, and nothing is downloaded. Memory is the peak of a run on MLX with a prompt and an answer of
4,096 tokens together and a cache in full precision; a device is named where that fits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

from apertus_mlx.cache.config import CacheConfig
from apertus_mlx.checkpoint.inventory import Inventory
from apertus_mlx.errors import ResourceError
from apertus_mlx.hub.apertus_models import (
    RELEASED,
    expected_download_bytes,
    expected_inventory,
    is_estimate,
)
from apertus_mlx.memory.devices import Device, known_devices
from apertus_mlx.memory.fit import fit
from apertus_mlx.memory.footprint import choose_backend
from apertus_mlx.system.sizes import format_bytes

CONTEXT = 4096
HEADER = "| command | download | memory | smallest iPhone | smallest Mac |"

# As people write them.
NAMES = {
    "iphone-12-mini": "iPhone 12 mini",
    "iphone-12-pro": "iPhone 12 Pro",
    "macbook-neo": "MacBook Neo",
}


def main() -> None:
    """Command line."""
    for line in table():
        print(line)


def table() -> Iterator[str]:
    """The table's lines, one for each released model."""
    yield HEADER
    yield "|" + "---|" * (HEADER.count("|") - 1)
    devices = sorted(known_devices(), key=lambda each: each.memory_bytes)
    for repo_id in RELEASED:
        inventory, sign = expected_inventory(repo_id), "~" if is_estimate(repo_id) else ""
        phone = _smallest(inventory, [each for each in devices if "iphone" in each.name])
        mac = _smallest(inventory, [each for each in devices if each.name.startswith("m")])
        memory_bytes = _peak(inventory, devices[-1])
        cells = [
            f"`apertus-mlx {_command(repo_id)}`",
            f"{sign}{format_bytes(expected_download_bytes(repo_id))}",
            f"{sign}{format_bytes(memory_bytes, round_up=True)}",
            "-" if phone is None else _words(phone),
            "-" if mac is None else _words(mac),
        ]
        yield f"| {' | '.join(cells)} |"


def _peak(inventory: Inventory, device: Device) -> int:
    """Bytes of a run on `device`.

    Raises:
        ResourceError: they do not fit there.
    """
    backend = choose_backend(inventory, on_gpu=True)
    return fit(
        inventory, device.memory_bytes, CONTEXT, backend, CacheConfig(), bounds=True
    ).footprint.total_bytes


def _smallest(inventory: Inventory, devices: list[Device]) -> Device | None:
    for device in devices:
        with suppress(ResourceError):
            _peak(inventory, device)
            return device
    return None


def _command(repo_id: str) -> str:
    """A model that was not taught to converse continues a text."""
    return (
        f"chat -m {repo_id}" if "-Instruct" in repo_id else f'generate --raw -m {repo_id} "Bern is"'
    )


def _words(device: Device) -> str:
    """Such as `iPhone 15 Pro, 8 GB`; of most Macs the chip."""
    memory = f"{(device.ram_bytes or 0) // 2**30} GB"
    if device.name in NAMES:
        return f"{NAMES[device.name]}, {memory}"
    return f"{device.chip}, {memory}"


if __name__ == "__main__":
    main()
