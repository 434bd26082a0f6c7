"""What the machine is, and whether MLX computes at all on it."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import mlx.core as mx
import numpy as np

from apertus_mlx.backend import hardware
from apertus_mlx.backend.metal.verdict import Machine, this_machine

PACKAGES = (
    *("mlx", "numpy", "safetensors", "huggingface_hub", "tokenizers", "jinja2", "typer"),
    *("onnxruntime", "mlx-lm", "transformers"),
)
# MLX reads them once, when it starts.
MLX_VARIABLES = ("MLX_MAX_OPS_PER_BUFFER", "MLX_MAX_MB_PER_BUFFER", "MLX_METAL_FAST_SYNCH")
# Most that a float32 product of 512 terms may be off, relative to the norm of the exact one.
PRODUCT_BOUND = 1e-5


@dataclass(frozen=True, slots=True)
class Facts:
    """A machine, as far as it matters for speed and for what fits."""

    identity: Machine
    architecture: str
    python: str
    # Whether kernels can be compiled, and whether MLX computes on a GPU of any kind.
    metal: bool
    gpu: bool
    memory_bytes: int
    available_bytes: int
    # What Metal recommends to use at most, and the largest single buffer.
    recommended_working_set_bytes: int | None
    largest_buffer_bytes: int | None
    # Environment variables that change how MLX runs, where set.
    mlx_variables: dict[str, str]
    # Name -> version; None for what is not installed.
    packages: dict[str, str | None]


def gather_facts() -> Facts:
    """Ask MLX and the system; takes no measurements."""
    info = hardware.device_info()
    largest = info.get("max_buffer_length")
    memory = info.get("memory_size")
    return Facts(
        identity=this_machine(),
        architecture=str(info.get("architecture", platform.machine())),
        python=platform.python_version(),
        metal=hardware.has_metal(),
        gpu=hardware.has_gpu(),
        memory_bytes=memory if isinstance(memory, int) else hardware.physical_bytes(),
        available_bytes=hardware.available_bytes(),
        recommended_working_set_bytes=hardware.working_set_bytes(),
        largest_buffer_bytes=largest if isinstance(largest, int) else None,
        mlx_variables={name: os.environ[name] for name in MLX_VARIABLES if name in os.environ},
        packages={name: _version(name) for name in PACKAGES},
    )


def product_errors() -> dict[str, float]:
    """Errors of MLX's float32 products of a vector, dense and with 4-bit weights.

    Against float64, relative to the norm of the exact product; see `PRODUCT_BOUND`.
    """
    keys = mx.random.split(mx.random.key(0), 2)
    x, weight = mx.random.normal((1, 512), key=keys[0]), mx.random.normal((256, 512), key=keys[1])
    codes = mx.quantize(weight, group_size=64, bits=4)
    product = mx.quantized_matmul(x, *codes, group_size=64, bits=4)
    restored = mx.dequantize(*codes, group_size=64, bits=4)
    return {
        "float32 product": _error(x @ weight.T, x, weight),
        "4-bit product": _error(product, x, restored),
    }


def _error(product: mx.array, x: mx.array, weight: mx.array) -> float:
    exact = np.array(x, np.float64) @ np.array(weight, np.float64).T
    return float(np.linalg.norm(np.array(product, np.float64) - exact) / np.linalg.norm(exact))


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
