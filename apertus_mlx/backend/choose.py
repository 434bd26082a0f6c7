"""Which form of the model runs: MLX, or where MLX has no GPU that of `apertus_mlx.backend.cpu`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence, Sized
from importlib.util import find_spec
from typing import Literal, Protocol

import mlx.core as mx

from apertus_mlx.backend.mlx import load_inventory
from apertus_mlx.cache import FULL_PRECISION, Cache, CacheConfig
from apertus_mlx.checkpoint.config import ModelConfig
from apertus_mlx.checkpoint.inventory import Inventory
from apertus_mlx.errors import ApertusError, UsageError
from apertus_mlx.model.scores import Scores
from apertus_mlx.system.foreign_errors import no_memory, out_of_memory

Compute = Literal["auto", "mlx", "cpu"]
Precision = Literal["auto", "float32", "int8"]

_log = logging.getLogger(__name__)


class LanguageModel(Protocol):
    """What decoding, chat and evaluation ask of a model."""

    @property
    def config(self) -> ModelConfig:
        """The configuration it was made from."""

    @property
    def arithmetic(self) -> str:
        """In words, what its numbers depend on beside the checkpoint, by more than rounding."""

    @property
    def model(self) -> Callable[..., mx.array]:
        """From token ids `[B, L]` and caches to final hidden states `[B, L, D]`."""

    @property
    def layers(self) -> Sized:
        """The decoder layers."""

    @property
    def on_gpu(self) -> bool:
        """Whether MLX's GPU computes it."""

    def __call__(self, inputs: mx.array, cache: Sequence[Cache | None] | None = None) -> mx.array:
        """Logits `[B, L, vocabulary]` of the token ids `inputs` `[B, L]`."""

    def logits(self, hidden: mx.array) -> mx.array:
        """Logits `[B, L, vocabulary]` of final hidden states `[B, L, D]`."""

    def scores(self, inputs: mx.array, cache: Sequence[Cache | None] | None = None) -> Scores:
        """Scores of the token after the last of `inputs` `[1, L]`."""

    def make_cache(self, form: CacheConfig = FULL_PRECISION) -> list[Cache]:
        """An empty cache of this form for each layer."""


def uses_host(compute: str, dtype: str | None) -> bool:
    """Whether `load_for` will choose the host's own form, if its libraries work."""
    if compute == "mlx" or dtype not in (None, "float32"):
        return False
    if compute == "auto" and mx.default_device() != mx.cpu:
        return False
    return find_spec("onnxruntime") is not None


def load_for(
    inventory: Inventory,
    compute: Compute = "auto",
    dtype: str | None = None,
    precision: Precision = "auto",
    on_bytes: Callable[[int, int], None] | None = None,
) -> LanguageModel:
    """Load what `take_inventory` found in the form that suits this machine.

    Args:
        inventory: the checkpoint.
        compute: `mlx`; `cpu` for the host's own form; `auto`: that one where MLX has no GPU, unless
            another `dtype` than float32 is asked for or it cannot be had (then with a note).
        dtype: see `load_model`.
        precision: of activations in the host's own form; see `HostModel`.
        on_bytes: is told the bytes read so far and in all.

    Raises:
        UsageError: `cpu`, but its libraries are missing, or with another `dtype` than float32.
        RejectedError: see `load_model` and `HostModel`.
    """
    if compute == "cpu" and dtype not in (None, "float32"):
        raise UsageError(f"--compute cpu computes in float32; leave out --dtype {dtype}")
    has_gpu = mx.default_device() != mx.cpu
    other_dtype = dtype not in (None, "float32")
    if compute == "mlx" or (compute == "auto" and (has_gpu or other_dtype)):
        return load_inventory(inventory, dtype, on_bytes)
    try:
        from apertus_mlx.backend.cpu.model import HostModel

        return HostModel(inventory, precision, on_bytes)
    except ImportError as error:
        if out_of_memory(error):
            raise no_memory(error) from None
        if compute == "cpu":
            raise UsageError(
                f"--compute cpu: {error}; install it: pip install 'apertus-mlx[cpu]'"
            ) from None
        reason = str(error)
    except ApertusError:
        raise
    except Exception as error:
        # Another version of onnxruntime may lack a kernel; what it raises has no common base.
        if out_of_memory(error):
            raise no_memory(error) from None
        if compute == "cpu" or not type(error).__module__.startswith("onnxruntime"):
            raise
        reason = " ".join(str(error).split())[:200]
    _log.warning("slow: MLX has no GPU here and onnxruntime cannot be used (%s)", reason)
    return load_inventory(inventory, dtype, on_bytes)
