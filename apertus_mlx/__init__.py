"""Run the Apertus language models with MLX. Importing this package loads nothing heavy.

It does turn off the telemetry of the libraries that it will use; see `telemetry`.
"""

from apertus_mlx import telemetry

__version__ = "0.1.0"

telemetry.turn_off()
