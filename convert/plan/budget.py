"""Whether an output fits the device that it is meant for, and which widths would."""

from __future__ import annotations

from apertus_mlx.cache import FULL_PRECISION
from apertus_mlx.convert.plan.plan import Plan
from apertus_mlx.errors import ResourceError
from apertus_mlx.memory import Device
from apertus_mlx.memory.footprint import kv_bytes
from apertus_mlx.quant.spec import AFFINE_BITS, QuantSpec
from apertus_mlx.system.sizes import format_bytes

CONTEXT = 4096
GROUP_SIZE = 64
CACHE_NUMBER_BYTES = 2
# Norms and whatever else is not quantized, on top of a uniform width.
REST_SHARE = 0.01


def require_fit(plan: Plan, device: Device) -> None:
    """Refuse an output that the device cannot hold with a 16-bit cache of 4,096 positions.

    Raises:
        ResourceError: it does not fit; names the widths that would, with their sizes.
    """
    config = plan.source.config
    context = min(CONTEXT, config.max_position_embeddings)
    cache_bytes = kv_bytes(config, FULL_PRECISION, context, CACHE_NUMBER_BYTES)
    room_bytes = device.memory_bytes - cache_bytes
    if plan.weight_bytes <= room_bytes:
        return
    sizes = {
        bits: (1 + REST_SHARE)
        * plan.parameters
        * QuantSpec(bits, GROUP_SIZE).bits_per_weight(2)
        / 8
        for bits in AFFINE_BITS
    }
    fitting = [
        f"{bits} ({format_bytes(size)})" for bits, size in sizes.items() if size <= room_bytes
    ]
    advice = f"--bits {' or '.join(fitting)} would fit" if fitting else "no width of it would fit"
    raise ResourceError(
        f"{device.name}: {format_bytes(device.memory_bytes)} for the process, but weights take "
        f"{format_bytes(plan.weight_bytes)} and the cache of {context} tokens "
        f"{format_bytes(cache_bytes)}; {advice}"
    )
