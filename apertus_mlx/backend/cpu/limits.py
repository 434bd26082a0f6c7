"""Which sound checkpoints the CPU path cannot run; nothing heavy is imported here."""

from apertus_mlx.errors import RejectedError

# What onnxruntime's attention asks of the size of a head.
HEAD_DIM_STEP = 8


class CPUCannotError(RejectedError):
    """A checkpoint that MLX can run, and the CPU path cannot."""
