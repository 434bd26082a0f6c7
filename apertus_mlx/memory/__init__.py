"""Memory: what a model costs to run, what fits a device, and MLX's limits."""

from apertus_mlx.memory.devices import Device, parse_device, parse_size
from apertus_mlx.memory.fit import Fit, fit, largest_context
from apertus_mlx.memory.footprint import Backend, Footprint, footprint

__all__ = [
    "Backend",
    "Device",
    "Fit",
    "Footprint",
    "fit",
    "footprint",
    "largest_context",
    "parse_device",
    "parse_size",
]
