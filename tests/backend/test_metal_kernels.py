"""The fused kernels beside the matvec, run from the text that MLX gets, against float64."""

from __future__ import annotations

import math
from itertools import product

import mlx.core as mx
import numpy as np
import pytest

from apertus_mlx.backend.metal.add_rms_norm import AddRMSNorm
from apertus_mlx.backend.metal.attention_input import MAX_SIMDGROUPS, ROWS_EACH, AttentionInput
from apertus_mlx.backend.metal.best_token import BestToken
from apertus_mlx.backend.metal.kernel import Kernel
from apertus_mlx.backend.metal.needed import kernels_for
from apertus_mlx.backend.metal.qk_norm_rope import QKNormRope
from apertus_mlx.model.apertus import rotary_wavelengths
from tests import metal_harness
from tests.daily import every, every_row
from tests.metal_cases import (
    DTYPES,
    HALF_ULP,
    RELEASED,
    RELEASED_BITS,
    error,
    errors,
    float64,
    released,
    run,
)

pytestmark = pytest.mark.skipif(
    metal_harness.missing() is not None, reason=str(metal_harness.missing())
)


@pytest.mark.parametrize("count", every(3, [33, 8, 31, 16384, 1024, 4096]))
def test_best_token_is_argmax(count: int) -> None:
    kernel = BestToken(count)
    peaks, tokens = kernel.trial(seed=count)
    assert run(kernel, [peaks, tokens])[0].item() == tokens[mx.argmax(peaks)].item()
    few = mx.floor(peaks)
    assert run(kernel, [few, tokens])[0].item() == tokens[mx.argmax(few)].item()
    few[: count // 2] = -math.inf
    few[count - 1] = 9
    assert run(kernel, [few, tokens])[0].item() == tokens[-1].item()
    assert run(kernel, [mx.full((count,), -math.inf), tokens])[0].item() == tokens[0].item()


@pytest.mark.parametrize(
    ("name", "dtype"), every_row(5, product([*RELEASED, "odd"], DTYPES)), ids=str
)
def test_qk_norm_rope(name: str, dtype: mx.Dtype) -> None:
    if name == "odd":
        kernel = QKNormRope(4, 2, 18, dtype)
        wavelengths = mx.array([5.0**i for i in range(9)])
    else:
        config = released(name)
        (kernel,) = (k for k in kernels_for(config, {}, dtype) if isinstance(k, QKNormRope))
        wavelengths = mx.array(rotary_wavelengths(config.head_dim, config.rope), mx.float32)
    qkv, q_norm, k_norm, *_ = kernel.trial(seed=5)
    first_value = (kernel.heads + kernel.kv_heads) * kernel.head_dim
    for position in (0, 1, 777, 4095, 65535, 2**24 - 1):
        inputs = [qkv, q_norm, k_norm, wavelengths, mx.array([position], mx.int32)]
        outputs = run(kernel, inputs, schedules=metal_harness.SCHEDULES[1:])
        # The norm, its weight and the rotation are rounded, each by half of that on average.
        limit = 3e-7 if dtype == mx.float32 else HALF_ULP[dtype]
        assert max(errors(kernel, inputs, outputs)) <= limit
        values = outputs[1][:, kernel.kv_heads :]
        assert mx.array_equal(values.reshape(-1), qkv.reshape(-1)[first_value:])


def test_qk_norm_rope_of_zero() -> None:
    kernel = QKNormRope(4, 2, 64, mx.float16)
    qkv, *rest = kernel.trial(seed=6)
    for output in run(kernel, [mx.zeros_like(qkv), *rest]):
        assert not mx.any(output).item()


def attention_inputs() -> list[AttentionInput]:
    """Each released width on the columns and heads of each model, of which few heads are enough."""
    cases = []
    for i, name in enumerate(RELEASED):
        columns, head_dim = RELEASED[name][0], released(name).head_dim
        fitting = [rows for rows in ROWS_EACH if head_dim <= MAX_SIMDGROUPS * rows]
        for j, bits in enumerate(RELEASED_BITS):
            dtype, rows = DTYPES[(i + j) % 3], fitting[(i // 3 + j) % len(fitting)]
            cases.append(AttentionInput(bits, 64, columns, 2, 1, head_dim, dtype, rows_each=rows))
    others = [
        AttentionInput(4, 64, 1024, 16, 4, 64, mx.bfloat16),
        AttentionInput(5, 32, 128, 3, 1, 32, mx.float32, rows_each=8),
        AttentionInput(8, 128, 1152, 2, 2, 48, mx.float16, rows_each=4),
    ]
    return [*cases, *others]


@pytest.mark.parametrize("kernel", every(7, attention_inputs()), ids=lambda kernel: kernel.key)
def test_attention_input(kernel: AttentionInput) -> None:
    inputs = kernel.trial(seed=11)
    limit = 2e-6 if kernel.dtype == mx.float32 else HALF_ULP[kernel.dtype]
    assert max(errors(kernel, inputs, run(kernel, inputs))) <= limit


@pytest.mark.parametrize(
    ("columns", "dtype"), every_row(7, product([1024, 2048, 3072, 4096, 8192, 40], DTYPES)), ids=str
)
def test_add_rms_norm(columns: int, dtype: mx.Dtype) -> None:
    kernel = AddRMSNorm(columns, dtype)
    weight = kernel.trial(seed=7)[2]
    rng = np.random.default_rng(columns)
    sizes = np.array([[[1.0], [1e-3], [30.0]]])
    residual, update = (mx.array(rng.standard_normal((1, 3, columns)) * sizes, dtype) for _ in "hx")
    inputs = [residual, update, weight]
    total, normed = run(kernel, inputs)
    assert mx.array_equal(total, residual + update)
    exact = kernel.exact([total, mx.zeros_like(total), weight])[1]
    assert error(normed, exact) <= HALF_ULP[dtype] + 4e-7
    if dtype != mx.float32:
        stock = float64(mx.fast.rms_norm(total, weight, kernel.eps))
        # Sums of squares may differ in their last bits, and so a result by a step.
        assert np.all(np.abs(float64(normed) - stock) <= 4 * HALF_ULP[dtype] * np.abs(stock))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add_rms_norm_of_zero_and_of_one_outlier(dtype: mx.Dtype) -> None:
    kernel = AddRMSNorm(1024, dtype)
    *_, weight = kernel.trial(seed=8)
    zero = mx.zeros((1, 1, 1024), dtype)
    assert not any(mx.any(output).item() for output in run(kernel, [zero, zero, weight]))
    outlier = mx.zeros((1, 1, 1024), dtype)
    outlier[0, 0, 500] = 3e4
    inputs = [zero, outlier, weight]
    assert max(errors(kernel, inputs, run(kernel, inputs))) <= kernel.tolerance


@pytest.mark.parametrize(
    "kernel",
    [
        QKNormRope(16, 4, 64, mx.float32),
        QKNormRope(4, 2, 128, mx.bfloat16),
        AddRMSNorm(1024, mx.float32),
        AddRMSNorm(1024, mx.float16),
        AttentionInput(4, 64, 1024, 2, 1, 64, mx.bfloat16),
    ],
    ids=lambda kernel: kernel.key,
)
def test_contraction_and_another_order_of_sums_stay_within_tolerance(kernel: Kernel) -> None:
    inputs = kernel.trial(seed=10)
    schedules = metal_harness.SCHEDULES[:1]
    outputs = run(kernel, inputs, contracts=True, reduces_pairwise=True, schedules=schedules)
    limit = 3e-7 if outputs[0].dtype == mx.float32 else kernel.tolerance
    assert max(errors(kernel, inputs, outputs)) <= limit
