"""What the tests of Metal kernels share: the released models, and running a kernel on the host."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from apertus_mlx.backend.metal.kernel import Kernel, build
from apertus_mlx.backend.metal.needed import kernels_for
from apertus_mlx.checkpoint import layout
from apertus_mlx.checkpoint.config import ModelConfig, parse_config
from apertus_mlx.quant.spec import QuantSpec
from tests import metal_harness
from tests.builders import config_4x

Exact = npt.NDArray[np.float64]

DTYPES = (mx.bfloat16, mx.float16, mx.float32)
RELEASED_BITS = (2, 3, 4, 6)
# The largest relative error of one rounding.
HALF_ULP = {mx.float32: 2.0**-24, mx.float16: 2.0**-11, mx.bfloat16: 2.0**-8}
# hidden size, MLP size, heads, KV heads, layers, tied; from the models' cards.
RELEASED = {
    "0.5B": (1024, 6144, 16, 4, 20, True),
    "1.5B": (2048, 12288, 32, 8, 16, False),
    "4B": (3072, 16384, 24, 8, 24, False),
    "8B": (4096, 21504, 32, 8, 32, False),
    "70B": (8192, 43008, 64, 8, 80, False),
}
LONG_CONTEXT = {
    "rope_theta": 12e6,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}

XIELU_POINTS = sorted(
    sign * value
    for sign in (1, -1)
    for value in (
        *(0.0, 1e-30, 1e-10, 9.9e-7, 1e-6, 1.01e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.1, 0.3, 0.49, 0.5),
        *(0.51, 0.9, 0.999, 1.0, 1.001, 1.5, 2.0, 5.0, 17.0, 50.0, 88.0, 104.0, 1e3, 6e4),
    )
)


def released(name: str) -> ModelConfig:
    hidden, inner, heads, kv_heads, layers, tied = RELEASED[name]
    return parse_config(
        config_4x(
            hidden_size=hidden,
            intermediate_size=inner,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            num_hidden_layers=layers,
            vocab_size=131072,
            tie_word_embeddings=tied,
            **(LONG_CONTEXT if name in ("8B", "70B") else {}),
        )
    )


def uniform(config: ModelConfig, spec: QuantSpec) -> dict[str, QuantSpec]:
    return {matrix.path: spec for matrix in layout.matrices(config)}


def needed(name: str, spec: QuantSpec, dtype: mx.Dtype) -> tuple[Kernel, ...]:
    config = released(name)
    return kernels_for(config, uniform(config, spec), dtype)


def float64(values: mx.array) -> Exact:
    return np.array(values.astype(mx.float32)).astype(np.float64)


def error(output: mx.array, exact: Exact) -> float:
    assert output.shape == exact.shape
    return float(np.linalg.norm(float64(output) - exact) / np.linalg.norm(exact))


def run(kernel: Kernel, inputs: Sequence[mx.array], **options: Any) -> list[mx.array]:
    """Outputs of the kernel's text on the host; `options` are those of the harness."""
    return build(kernel, partial(metal_harness.metal_kernel, **options))(inputs)


def errors(kernel: Kernel, inputs: Sequence[mx.array], outputs: Sequence[mx.array]) -> list[float]:
    """Of each output but token ids: their neighbours may tie, in float64 they do not."""
    exact = kernel.exact(inputs)
    assert len(outputs) == len(exact)
    pairs = zip(outputs, exact, strict=True)
    return [error(output, truth) for output, truth in pairs if output.dtype != mx.uint32]


def passed_through(
    values: Sequence[float] | Exact, dtype: mx.Dtype, bits: int = 4
) -> list[mx.array]:
    """Inputs of a matvec whose sums are exactly `values`: biases times 32 x of 1/32."""
    biases = mx.array(np.array(values), dtype)[:, None]
    x = mx.full((1, 1, 32), 1 / 32, dtype)
    return [x, mx.zeros((len(values), bits), mx.uint32), mx.zeros_like(biases), biases]
