"""Which form of the model runs: MLX, or where MLX has no GPU that of `apertus_mlx.backend.cpu`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Literal

from apertus_mlx.backend import hardware
from apertus_mlx.backend.cpu.limits import CPUCannotError
from apertus_mlx.backend.mlx import load_inventory
from apertus_mlx.backend.ranks import joined
from apertus_mlx.checkpoint.inventory import Inventory
from apertus_mlx.errors import ApertusError, UsageError
from apertus_mlx.model.disk_embedding import require_untied
from apertus_mlx.model.language_model import LanguageModel
from apertus_mlx.system.foreign_errors import no_memory, out_of_memory

Compute = Literal["auto", "mlx", "cpu"]
Precision = Literal["auto", "float32", "int8"]
Embedding = Literal["memory", "disk"]

_log = logging.getLogger(__name__)


def uses_cpu(compute: str, dtype: str | None) -> bool:
    """Whether `load_for` will choose the CPU path, if its libraries work."""
    return _wants_cpu(compute, dtype) and hardware.has_library("onnxruntime")


def _wants_cpu(compute: str, dtype: str | None) -> bool:
    if joined() is not None or compute == "mlx" or dtype not in (None, "float32"):
        return False
    return compute == "cpu" or not hardware.has_gpu()


def load_for(
    inventory: Inventory,
    compute: Compute = "auto",
    dtype: str | None = None,
    precision: Precision = "auto",
    on_bytes: Callable[[int, int], None] | None = None,
    embedding: Embedding = "memory",
) -> LanguageModel:
    """Load what `take_inventory` found in the form that suits this machine.

    Args:
        inventory: the checkpoint.
        compute: `mlx`; `cpu` for the CPU path; `auto`: that one where MLX has no GPU, unless
            another `dtype` than float32 is asked for or it cannot be had or cannot run this
            checkpoint (then with a note). Several ranks compute with MLX.
        dtype: see `load_model`.
        precision: of activations on the CPU path; see `CPUModel`.
        on_bytes: is told the bytes read so far and in all.
        embedding: `disk` leaves the rows of an untied embedding in the file, where the CPU path
            leaves them in any case.

    Raises:
        UsageError: `cpu`, but its libraries are missing, or with another `dtype` than float32; a
            `precision` where MLX computes; `disk`, but the head is the embedding.
        RejectedError: see `load_model` and `CPUModel`.
    """
    if compute == "cpu" and dtype not in (None, "float32"):
        raise UsageError(f"--compute cpu computes in float32; leave out --dtype {dtype}")
    on_disk, ranks = embedding == "disk", joined()
    if on_disk:
        require_untied(inventory)
    if ranks is not None and (compute == "cpu" or on_disk):
        option = "--compute cpu" if compute == "cpu" else "--embedding disk"
        raise UsageError(f"{option} is for one machine; under mlx.launch leave it out")
    if not _wants_cpu(compute, dtype):
        if precision != "auto":
            raise UsageError(
                f"--precision {precision} is for the CPU path, but MLX computes here; "
                "leave it out, or add --compute cpu"
            )
        return load_inventory(inventory, dtype, on_bytes, on_disk, ranks)
    try:
        from apertus_mlx.backend.cpu.model import CPUModel

        return CPUModel(inventory, precision, on_bytes)
    except CPUCannotError as error:
        if compute == "cpu":
            raise
        reason = str(error)
    except ApertusError:
        raise
    except Exception as error:
        if out_of_memory(error):
            raise no_memory(error) from None
        missing = isinstance(error, ImportError)
        if missing and compute == "cpu":
            raise UsageError(
                f"--compute cpu: {error}; it needs pip install onnx onnxruntime"
            ) from None
        # Another version of onnxruntime may lack a kernel; what it raises has no common base.
        foreign = missing or type(error).__module__.startswith("onnxruntime")
        if compute == "cpu" or not foreign:
            raise
        reason = f"onnxruntime cannot be used ({' '.join(str(error).split())[:200]})"
    _log.warning("slow: MLX has no GPU here, and %s", reason)
    return load_inventory(inventory, dtype, on_bytes, on_disk)
