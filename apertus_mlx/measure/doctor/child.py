"""A device in a process of its own: the side that runs kernels, and may not live through it."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from apertus_mlx.backend.metal.kernel import Kernel
from apertus_mlx.measure.doctor.device import Device, UnfitError
from apertus_mlx.measure.other_process import send

MAX_REASON = 600


def serve(connection: Connection, device: Device, kernels: Sequence[Kernel]) -> None:
    """Answer questions about `kernels` until nobody asks any more; the first asks for nothing."""
    by_key = {kernel.key: kernel for kernel in kernels}
    while True:
        try:
            question = json.loads(connection.recv_bytes())
        except EOFError:
            return
        reply: Mapping[str, Any] = {}
        try:
            if question:
                chosen = [by_key[key] for key in question["kernels"]]
                reply = {"value": _answer(device, question["call"], chosen, question["flags"])}
        except UnfitError as error:
            reply = {"unfit": str(error)}
        except Exception as error:  # noqa: BLE001 - whatever a kernel raises is its reason
            text = " ".join(str(error).split())[:MAX_REASON]
            reply = {"unfit": f"{type(error).__name__}: {text}"}
        send(connection, reply)


def _answer(device: Device, call: str, kernels: Sequence[Kernel], flags: Sequence[bool]) -> Any:
    """What the method `call` of `device` returns."""
    if call == "attempt":
        return asdict(device.attempt(kernels[0]))
    if call == "seconds":
        return device.seconds(kernels[0], *flags)
    by_place = {kernel.place: kernel for kernel in kernels}
    if call == "agreement":
        return asdict(device.agreement(by_place, *flags))
    return device.step_seconds(by_place, *flags)


def main(folder: str, dtype: str, descriptor: str) -> None:
    """Serve MLX's own device for the model in `folder`."""
    from apertus_mlx.backend.metal.needed import kernels_for
    from apertus_mlx.backend.mlx import DTYPES
    from apertus_mlx.checkpoint.inventory import take_inventory
    from apertus_mlx.measure.doctor.mlx_device import MLXDevice

    inventory = take_inventory(Path(folder))
    kernels = kernels_for(inventory.config, inventory.specs, DTYPES[dtype])
    serve(Connection(int(descriptor)), MLXDevice(inventory, dtype), kernels)


if __name__ == "__main__":
    main(*sys.argv[1:])
