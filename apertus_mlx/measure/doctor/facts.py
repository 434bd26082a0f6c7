"""What the machine is, and whether MLX computes at all on it."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import mlx.core as mx
import numpy as np

from apertus_mlx.backend import hardware, tf32
from apertus_mlx.backend.metal.verdict import Machine, this_machine

PACKAGES = (
    *("mlx", "numpy", "safetensors", "huggingface_hub", "tokenizers", "jinja2", "typer"),
    *("onnxruntime", "mlx-lm", "transformers"),
)
# MLX reads them once, when it starts.
MLX_VARIABLES = (
    *("MLX_MAX_OPS_PER_BUFFER", "MLX_MAX_MB_PER_BUFFER", "MLX_METAL_FAST_SYNCH"),
    tf32.VARIABLE,
)
# Each brings a library under the same name: the one installed last is loaded.
MLX_WHEELS = ("mlx-metal", "mlx-cpu", "mlx-cuda-12", "mlx-cuda-13")
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
    # Which of MLX's libraries is loaded (metal, cuda or cpu), and the packages that bring one.
    mlx_library: str
    mlx_wheels: dict[str, str]


def gather_facts() -> Facts:
    """Ask MLX and the system; takes no measurements."""
    info = hardware.device_info()
    largest = info.get("max_buffer_length")
    memory, own = info.get("memory_size"), hardware.card()
    if own is not None:
        memory = own.memory_bytes
    wheels = {name: _version(name) for name in MLX_WHEELS}
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
        mlx_library=hardware.mlx_library(),
        mlx_wheels={name: number for name, number in wheels.items() if number is not None},
    )


def product_errors() -> dict[str, float]:
    """Errors of MLX's float32 products of a vector and of 64, dense and with 4-bit weights.

    Against float64, relative to the norm of the exact product; see `PRODUCT_BOUND`. Other kernels
    compute the product of 64 rows, on some GPUs in TF32.
    """
    keys = mx.random.split(mx.random.key(0), 2)
    many, weight = (
        mx.random.normal((rows, 512), key=key) for rows, key in zip((64, 256), keys, strict=True)
    )
    codes = mx.quantize(weight, group_size=64, bits=4)
    restored = mx.dequantize(*codes, group_size=64, bits=4)
    errors = {}
    for words, x in (("", many[:1]), (" of 64 rows", many)):
        product = mx.quantized_matmul(x, *codes, group_size=64, bits=4)
        errors[f"float32 product{words}"] = _error(x @ weight.T, x, weight)
        errors[f"4-bit product{words}"] = _error(product, x, restored)
    return errors


def _error(product: mx.array, x: mx.array, weight: mx.array) -> float:
    exact = np.array(x, np.float64) @ np.array(weight, np.float64).T
    return float(np.linalg.norm(np.array(product, np.float64) - exact) / np.linalg.norm(exact))


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
