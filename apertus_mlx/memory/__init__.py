"""Memory: what a model costs to run, what fits a device, and MLX's limits."""

from apertus_mlx.memory.devices import DEVICE_EXAMPLES, Device, parse_device, parse_size
from apertus_mlx.memory.fit import Fit, fit, largest_context
from apertus_mlx.memory.footprint import Backend, Footprint, footprint
from apertus_mlx.memory.subject import Subject, local_subject, remote_subject

__all__ = [
    "DEVICE_EXAMPLES",
    "Backend",
    "Device",
    "Fit",
    "Footprint",
    "Subject",
    "fit",
    "footprint",
    "largest_context",
    "local_subject",
    "parse_device",
    "parse_size",
    "remote_subject",
]
