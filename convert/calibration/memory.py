"""What needs more memory than this machine has is refused before it begins."""

from __future__ import annotations

from apertus_mlx.backend.hardware import available_bytes
from apertus_mlx.convert.plan.plan import calibration_memory_bytes, tuning_memory_bytes
from apertus_mlx.convert.plan.policy import Request
from apertus_mlx.convert.sources.source import Source
from apertus_mlx.errors import ResourceError
from apertus_mlx.system.sizes import format_bytes


def require_memory(source: Source, request: Request) -> None:
    """Refuse a calibration, or a tuning after it, that does not fit.

    Raises:
        ResourceError: it takes more than is available; names both, and what takes less.
    """
    config, available = source.config, available_bytes()
    calibrating = calibration_memory_bytes(config, request.tune)
    parts = [("calibration", calibrating, "--method search reads no text")]
    if request.tune:
        parts.append(("--tune", tuning_memory_bytes(config), "leave it out"))
    for name, needed, way_out in parts:
        if needed > available:
            raise ResourceError(
                f"{source.name}: {name} takes about {format_bytes(needed)} of memory, "
                f"{format_bytes(available)} are available; {way_out}"
            )
