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
    parts = [("calibration", calibration_memory_bytes(config), "--method search reads no text")]
    if request.tune:
        # It calibrates on more text, too.
        tuning = max(calibration_memory_bytes(config, True), tuning_memory_bytes(config))
        parts.append(("--tune", tuning, "leave it out"))
    for name, needed, way_out in parts:
        if needed > available:
            raise ResourceError(
                f"{source.name}: {name} takes about {format_bytes(needed)} of memory, "
                f"{format_bytes(available)} are available; {way_out}"
            )
