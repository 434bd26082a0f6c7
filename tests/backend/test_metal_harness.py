"""The harness for Metal kernels: faulty kernels are refused, their correct twins run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from apertus_mlx.backend.metal.kernel import KernelText
from tests import metal_harness
from tests.daily import every
from tests.metal_harness import Array, HarnessError, generate, metal_kernel

needs_compiler = pytest.mark.skipif(
    metal_harness.missing() is not None, reason=str(metal_harness.missing())
)

COUNT, GROUP = 256, 64
FLOATS = mx.arange(COUNT).astype(mx.float32)
PLACE = "uint i = thread_position_in_grid.x, t = thread_index_in_threadgroup;\n"
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"


def run(body: str, header: str = "", **options: Any) -> mx.array:
    """`o`, one float for each of COUNT threads, from the input `x`."""
    launch = metal_kernel("tested", ["x"], ["o"], PLACE + body, header, **options)
    (output,) = launch(
        inputs=[FLOATS],
        grid=(COUNT, 1, 1),
        threadgroup=(GROUP, 1, 1),
        output_shapes=[(COUNT,)],
        output_dtypes=[mx.float32],
    )
    return output


# Faults and their twins ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Fault:
    body: str
    message: str
    # The same idea without the fault.
    twin: str


FAULTS = {
    "a barrier is missing": Fault(
        "threadgroup float s[64]; s[t] = x[i]; o[i] = s[63 - t];",
        "output o depends on the thread order",
        f"threadgroup float s[64]; s[t] = x[i]; {BARRIER} o[i] = s[63 - t];",
    ),
    "memory is used again without a barrier": Fault(
        f"""threadgroup float s[2];
        float sum = simd_sum(x[i]);
        if (t % 32 == 0) {{ s[t / 32] = sum; }}
        {BARRIER}
        float both = s[0] + s[1];
        if (t % 32 == 0) {{ s[t / 32] = -sum; }}
        {BARRIER}
        o[i] = both + s[0];""",
        "output o depends on the thread order",
        f"""threadgroup float s[2];
        float sum = simd_sum(x[i]);
        if (t % 32 == 0) {{ s[t / 32] = sum; }}
        {BARRIER}
        float both = s[0] + s[1];
        {BARRIER}
        if (t % 32 == 0) {{ s[t / 32] = -sum; }}
        {BARRIER}
        o[i] = both + s[0];""",
    ),
    "threadgroups write the same place": Fault(
        "o[i] = x[i]; if (t == 0) { o[0] = x[i]; }",
        "output o depends on the thread order",
        "o[i] = x[i]; if (t == 0) { o[i] = 0.0f; }",
    ),
    "an input is read past its end": Fault(
        "o[i] = x[i + 1];", "byte 1024 of x, which has 1024", "o[i] = x[(i + 1) % 256];"
    ),
    "an input is read before its start": Fault(
        "const device float* p = x - 1200; o[i] = p[i];",
        "byte -4800 of x",
        "const device float* p = x + 1200; o[i] = p[int(i) - 1200];",
    ),
    "an input is written": Fault(
        "((device float*)x)[i] = 0.0f; o[i] = 0.0f;", "byte 0 of x", "o[i] = x[i] * 0.0f;"
    ),
    "an output is written before its start": Fault(
        "o[i] = x[i]; if (i == 5) { o[int(i) - 6] = 0.0f; }",
        r"writes beside o \(1024 bytes\) at byte -4",
        "o[i] = x[i]; if (i == 5) { o[i] = 0.0f; }",
    ),
    "an output is not written": Fault(
        "if (i != 17) { o[i] = x[i]; }", "output o is not written at byte 68", "o[i] = x[i];"
    ),
    "a load is misaligned": Fault(
        "const device uchar* p = (const device uchar*)x;"
        "o[i] = float(*(const device uint*)(p + (i % 8) * 3));",
        "undefined behaviour",
        "const device uchar* p = (const device uchar*)x;"
        "o[i] = float(*(const device uint*)(p + (i % 8) * 4));",
    ),
    "a shift is too wide": Fault(
        "o[i] = float(1u << i);", "undefined behaviour", "o[i] = float(1u << (i % 32));"
    ),
    "a conversion does not fit": Fault(
        "o[i] = float(int(x[i] * 1e30f));", "undefined behaviour", "o[i] = float(int(x[i]));"
    ),
    "a bit field exceeds its word": Fault(
        "o[i] = float(extract_bits(7u, 24u + i % 16, 4u));",
        "extract_bits: offset 29 [+] bits 4",
        "o[i] = float(extract_bits(7u, 16u + i % 12, 4u));",
    ),
    "a barrier is in a branch": Fault(
        f"if (t < 16) {{ {BARRIER} }} o[i] = 0.0f;",
        "reached by 16 of 64 threads",
        f"if (t < 64) {{ {BARRIER} }} o[i] = 0.0f;",
    ),
    "branches have barriers of their own": Fault(
        f"if (t < 32) {{ {BARRIER} }}\nelse {{ {BARRIER} }} o[i] = 0.0f;",
        "divergent threadgroup_barrier: thread 0 is at body:2, thread 32 at body:3",
        f"if (t < 32) {{ o[i] = 0.0f; }}\nelse {{ o[i] = 0.0f; }} {BARRIER}",
    ),
    "a reduction is in a branch": Fault(
        "float v = 0.0f;\nif (t % 2 == 0) { v = simd_sum(x[i]); }\nelse { v = simd_max(v); }"
        "o[i] = v;",
        "divergent collective: thread 0 is in simd_sum at body:3",
        "float v = simd_sum(t % 2 == 0 ? x[i] : 0.0f); o[i] = v;",
    ),
    "some wait for a barrier and some for lanes": Fault(
        f"if (t == 0) {{ {BARRIER} simd_sum(0.0f); }} else {{ simd_sum(1.0f); }} o[i] = 0.0f;",
        "thread 0 in threadgroup_barrier",
        f"{BARRIER} simd_sum(0.0f); o[i] = 0.0f;",
    ),
    "a barrier orders no memory": Fault(
        "threadgroup_barrier(mem_flags::mem_none); o[i] = 0.0f;", "mem_none", f"{BARRIER} o[i] = 0;"
    ),
    "a lane is asked that does not exist": Fault(
        "o[i] = simd_shuffle(x[i], t % 64);", "reads lane 32", "o[i] = simd_shuffle(x[i], t % 32);"
    ),
    "threadgroup memory is read past its end": Fault(
        f"threadgroup float s[60]; threadgroup float* p = s; p[t % 60] = 0.0f; {BARRIER}"
        "o[i] = p[4 * t];",
        "beside threadgroup variable s",
        f"threadgroup float s[60]; threadgroup float* p = s; p[t % 60] = 0.0f; {BARRIER}"
        "o[i] = p[t % 60];",
    ),
    "threadgroup memory is written past its end": Fault(
        "threadgroup float s[61]; threadgroup float* p = s; p[min(t, 61u)] = 0.0f; o[i] = 0.0f;",
        r"writes beside threadgroup variable s \(244 bytes\) at byte 244",
        "threadgroup float s[61]; threadgroup float* p = s; p[min(t, 60u)] = 0.0f; o[i] = 0.0f;",
    ),
    "threadgroup memory is too large": Fault(
        "threadgroup float s[9000]; s[t] = 0.0f; o[i] = s[t];",
        "36000 bytes of threadgroup memory; Metal has 32768",
        "threadgroup float s[8192]; s[t] = 0.0f; o[i] = s[t];",
    ),
    "Metal lacks a function": Fault(
        "o[i] = expm1(x[i]);", "does not compile: body:2", "o[i] = exp(x[i]) - 1.0f;"
    ),
    "Metal lacks double": Fault(
        "double d = x[i]; o[i] = d;", "does not compile: body:2", "float d = x[i]; o[i] = d;"
    ),
    "a variable is read before it is written": Fault(
        "float v; o[i] = v + x[i];", "does not compile: body:2", "float v = 0.0f; o[i] = v + x[i];"
    ),
    "a declaration gives threadgroup memory a value": Fault(
        "threadgroup float s[1] = {0.0f}; o[i] = s[0];",
        "declare threadgroup variable s alone",
        "threadgroup float s[1]; s[0] = 0.0f; o[i] = s[0];",
    ),
    "the kernel does not end": Fault(
        "for (uint n = 1; n > 0; n |= 1u) { simd_sum(0.0f); } o[i] = 0.0f;",
        "does not end",
        "for (uint n = 1; n > 0; n /= 2) { simd_sum(0.0f); } o[i] = 0.0f;",
    ),
}


@needs_compiler
@pytest.mark.parametrize("fault", every(6, FAULTS.values()), ids=FAULTS.keys())
def test_faults_are_refused(fault: Fault) -> None:
    with pytest.raises(HarnessError, match=fault.message):
        run(fault.body, cpu_limit_s=0.3)
    run(fault.twin)


@needs_compiler
def test_a_variable_that_was_never_written_shows() -> None:
    values = run("float v[8]; v[i % 4] = 1.0f; o[i] = v[x[i] == 9.0f ? 7 : i % 4];")
    assert values[8].item() == 1.0
    # Huge with one compiler, not a number with the other.
    assert not abs(values[9].item()) < 1e38


@needs_compiler
def test_threadgroup_memory_belongs_to_kernels() -> None:
    with pytest.raises(HarnessError, match="variable s outside the kernel"):
        run("o[i] = f();", "inline float f() { threadgroup float s[1]; return s[0]; }")


@needs_compiler
def test_what_metal_does_not_dispatch() -> None:
    for grid, threadgroup, message in (
        ((2048, 1, 1), (1025, 1, 1), "1025 threads in a threadgroup"),
        ((0, 1, 1), (1, 1, 1), "is empty"),
    ):
        with pytest.raises(HarnessError, match=message):
            metal_kernel("f", ["x"], ["o"], "o[0] = x[0];")(
                inputs=[FLOATS],
                grid=grid,
                threadgroup=threadgroup,
                output_shapes=[(1,)],
                output_dtypes=[mx.float32],
            )


# The text that MLX generates -------------------------------------------------------------------


def test_signature_follows_size_and_names() -> None:
    body = "o[0] = big[0] + small[0] + single + grid_size.x * big_shape[0] * small_strides[0];"
    text = KernelText("f", ("big", "small", "single"), ("o",), body, "// thread_index_in_simdgroup")
    inputs = (Array((2, 4), mx.bfloat16), Array((7,), mx.float16), Array((), mx.int32))
    kernel = generate(text, inputs, (Array((1,), mx.float32),))
    assert [(each.type, each.name, each.buffer) for each in kernel.parameters] == [
        ("const device bfloat16_t*", "big", 0),
        ("const constant int*", "big_shape", 1),
        ("const constant float16_t*", "small", 2),
        ("const constant int64_t*", "small_strides", 3),
        ("const constant int32_t&", "single", 4),
        ("device float*", "o", 5),
        ("uint3", "grid_size", None),
    ]
    assert kernel.text.startswith(text.header + "[[kernel]] void custom_kernel_f")
    assert kernel.text.endswith(") {\n" + body + "\n}\n")


def test_traced_function_shows_its_kernels() -> None:
    texts = [
        KernelText(name, ("x",), ("o",), f"o[{i}] = x[{i}];", "")
        for i, name in enumerate(("first", "second", "third"))
    ]
    first, second, _ = (
        mx.fast.metal_kernel(text.name, text.input_names, text.output_names, text.source)
        for text in texts
    )
    launch = {"grid": (1, 1, 1), "threadgroup": (1, 1, 1), "output_dtypes": [mx.float32]}

    def step(x: mx.array) -> mx.array:
        for kernel in (first, second, first):
            (x,) = kernel(inputs=[mx.abs(x)], output_shapes=[x.shape], **launch)
        return x

    counts = metal_harness.count_launches(step, [FLOATS], texts)
    assert counts == {"first": 2, "second": 1, "third": 0}


@needs_compiler
def test_shapes_and_strides_arrive() -> None:
    launch = metal_kernel(
        "f",
        ["x"],
        ["o"],
        "for (int a = 0; a < x_ndim; a++) { o[2 * a] = x_shape[a]; o[2 * a + 1] = x_strides[a]; }",
    )
    # The transposed view becomes row-contiguous, as with MLX.
    (output,) = launch(
        inputs=[mx.zeros((4, 3, 2)).T],
        grid=(1, 1, 1),
        threadgroup=(1, 1, 1),
        output_shapes=[(6,)],
        output_dtypes=[mx.int32],
    )
    assert output.tolist() == [2, 12, 3, 4, 4, 1]


# What threads know and do together -------------------------------------------------------------


@needs_compiler
def test_positions_of_threads() -> None:
    body = """
      const uint3 p = thread_position_in_grid, n = threads_per_grid;
      const uint at = 10 * (p.x + n.x * (p.y + n.y * p.z));
      o[at] = thread_position_in_threadgroup.x;
      o[at + 1] = thread_position_in_threadgroup.y;
      o[at + 2] = threadgroup_position_in_grid.x;
      o[at + 3] = threadgroup_position_in_grid.y;
      o[at + 4] = threads_per_threadgroup.x;
      o[at + 5] = threadgroups_per_grid.x;
      o[at + 6] = thread_index_in_threadgroup;
      o[at + 7] = thread_index_in_simdgroup;
      o[at + 8] = simdgroup_index_in_threadgroup;
      o[at + 9] = p.z;
    """
    grid, group = (70, 3, 2), (40, 2, 1)
    (output,) = metal_kernel("f", ["x"], ["o"], body)(
        inputs=[FLOATS],
        grid=grid,
        threadgroup=group,
        output_shapes=[(*reversed(grid), 10)],
        output_dtypes=[mx.uint32],
    )
    for z, y, x in np.ndindex(*reversed(grid)):
        inner = x % 40, y % 2
        # At the edge of the grid a threadgroup is smaller.
        width = 40 if x < 40 else 30
        index = inner[0] + width * inner[1]
        expected = [*inner, x // 40, y // 2, width, 2, index, index % 32, index // 32, z]
        assert np.array(output[z, y, x]).tolist() == expected


@needs_compiler
def test_collectives() -> None:
    lanes = np.arange(32)
    values = np.random.default_rng(0).integers(0, 100, (COUNT // 32, 32)).astype(np.float32)
    down, up = np.minimum(lanes + 3, 31), np.maximum(lanes - 3, 0)
    down[lanes > 28], up[lanes < 3] = lanes[lanes > 28], lanes[lanes < 3]
    expected = {
        "simd_sum(v)": values.sum(1, keepdims=True),
        "simd_max(v)": values.max(1, keepdims=True),
        "simd_min(v)": values.min(1, keepdims=True),
        "simd_prefix_inclusive_sum(v)": values.cumsum(1),
        "simd_prefix_exclusive_sum(v)": values.cumsum(1) - values,
        "simd_shuffle_xor(v, 5)": values[:, lanes ^ 5],
        "simd_shuffle_down(v, 3)": values[:, down],
        "simd_shuffle_up(v, 3)": values[:, up],
        "simd_broadcast(v, 7)": values[:, 7:8],
        "simd_broadcast_first(v)": values[:, :1],
        "float(simd_any(v > 97.0f))": (values > 97).any(1, keepdims=True),
        "float(simd_all(v > 2.0f))": (values > 2).all(1, keepdims=True),
    }
    body = "const float v = x[thread_position_in_grid.x];\n" + "".join(
        f"o[{i * COUNT} + thread_position_in_grid.x] = {call};\n" for i, call in enumerate(expected)
    )
    (output,) = metal_kernel("f", ["x"], ["o"], body)(
        inputs=[mx.array(values)],
        grid=(COUNT, 1, 1),
        threadgroup=(GROUP, 1, 1),
        output_shapes=[(len(expected), *values.shape)],
        output_dtypes=[mx.float32],
    )
    for (call, wanted), got in zip(expected.items(), np.array(output), strict=True):
        assert np.array_equal(got, np.broadcast_to(wanted, got.shape)), call


# Arithmetic ------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_16_bit_operations_round(dtype: mx.Dtype) -> None:
    a, b = (3 * mx.random.normal((2, 4096), dtype, key=mx.random.key(1))).split(2)
    body = """
      const uint i = thread_position_in_grid.x;
      o[i] = a[i] + b[i];
      o[4096 + i] = a[i] - b[i];
      o[8192 + i] = a[i] * b[i];
      o[12288 + i] = a[i] / b[i];
    """
    (output,) = metal_kernel("f", ["a", "b"], ["o"], body)(
        inputs=[a, b],
        grid=(4096, 1, 1),
        threadgroup=(256, 1, 1),
        output_shapes=[(4, 1, 4096)],
        output_dtypes=[dtype],
    )
    assert mx.array_equal(output, mx.stack([a + b, a - b, a * b, a / b]))


@needs_compiler
def test_orders_of_summation() -> None:
    body = "o[i] = simd_sum(x[i] * 0.001f);"
    terms = np.array(FLOATS).reshape(-1, 32) * np.float32(0.001)
    in_order = np.add.accumulate(terms, axis=1)[:, -1:]
    assert np.array_equal(np.array(run(body)).reshape(-1, 32), np.broadcast_to(in_order, (8, 32)))
    while terms.shape[1] > 1:
        half = terms.shape[1] // 2
        terms = terms[:, :half] + terms[:, half:]
    pairwise = np.array(run(body, reduces_pairwise=True)).reshape(-1, 32)
    assert np.array_equal(pairwise, np.broadcast_to(terms, (8, 32)))
    assert not np.array_equal(terms, in_order)


@needs_compiler
def test_contraction() -> None:
    body = "const float v = x[i] * 1.1f; o[i] = v * v - 3.0f * v;"
    v = np.array(FLOATS) * np.float32(1.1)
    apart = v * v - np.float32(3) * v
    assert np.array_equal(np.array(run(body)), apart)
    assert np.allclose(np.array(run(body, contracts=True)), apart, rtol=1e-5, atol=1e-5)


# Lint ------------------------------------------------------------------------------------------
