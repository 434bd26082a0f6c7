"""The lint for Metal kernels: planted errors are found, clean text is not blamed."""

from __future__ import annotations

import mlx.core as mx
import pytest

from apertus_mlx.backend.metal.kernel import KernelText
from tests import metal_harness
from tests.metal_harness import Array, generate
from tests.metal_harness.lint import STANDARDS, lint

needs_compiler = pytest.mark.skipif(
    metal_harness.missing() is not None, reason=str(metal_harness.missing())
)

COUNT, GROUP = 256, 64
FLOATS = mx.arange(COUNT).astype(mx.float32)
PLACE = "uint i = thread_position_in_grid.x, t = thread_index_in_threadgroup;\n"
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"


LINT_FAULTS = {
    "device pointer for a thread's": (
        "inline float f(const thread float* p) { return p[0]; }",
        "o[0] = f(x);",
        "no matching function",
    ),
    "threadgroup pointer for the device's": (
        "inline float f(const device float* p) { return p[0]; }",
        "threadgroup float s[4]; s[0] = x[0]; o[0] = f(s);",
        "no matching function",
    ),
    "device memory for a constant reference": (
        "inline float f(const constant float& v) { return v; }",
        "o[0] = f(x[0]);",
        "no matching function",
    ),
    "write to an input": ("", "x[0] = 1.0f; o[0] = 0.0f;", "read-only"),
    "parameter without address space": (
        "inline float f(const float* p) { return p[0]; }",
        "float v[2] = {x[0], 0.0f}; o[0] = f(v);",
        "header:1: pointer 'p' has no address space",
    ),
    "member without address space": (
        "struct Row { const float* values; };",
        "float v[1] = {x[0]}; Row row = {v}; o[0] = row.values[0];",
        "header:1: pointer 'values' has no address space",
    ),
    "cast to another address space": (
        "",
        "const thread float* p = (const thread float*)x; o[0] = p[0];",
        "leaves the address space",
    ),
    "small input is not in device memory": (
        "",
        "const device float* p = small; o[0] = x[0] + p[0];",
        "cannot initialize",
    ),
    "function of the host": ("", "o[0] = expm1(x[0]);", "poisoned"),
    "standard library": ("", "o[0] = std::exp(x[0]);", "poisoned"),
    "double by a literal": ("", "o[0] = x[0] * 0.5;", "body:1: 0.5 is a double"),
    "constant of the program outside constant memory": (
        "constexpr int K = 3;",
        "o[0] = K;",
        "header:1: 'K' outlives its thread",
    ),
    "static variable of a function": ("", "static int n = 1; o[0] = n;", "outlives its thread"),
    "threadgroup variable in a helper": (
        "inline float f() { threadgroup float s[3]; s[0] = 1.0f; return s[0]; }",
        "o[0] = f();",
        "outside a kernel's own braces",
    ),
    "threadgroup variable in a branch": (
        "",
        "if (x[0] > 1.0f) { threadgroup float s[3]; s[0] = 1.0f; o[0] = s[0]; }",
        "outside a kernel's own braces",
    ),
    "threadgroup variable with a value": (
        "",
        "threadgroup float s[1] = {1.0f}; o[0] = s[0];",
        "initial value",
    ),
    "lambda": ("", "const auto f = [](float a) { return a; }; o[0] = f(x[0]);", "no lambda"),
    "recursion": (
        "inline float f(int n) { return n ? f(n - 1) : 0.0f; }",
        "o[0] = f(3);",
        "recursion",
    ),
    "attribute that only the header names": (
        "inline float f() { return float(thread_index_in_simdgroup); }",
        "o[0] = f();",
        "thread_index_in_simdgroup does not occur in the body",
    ),
}
CLEAN_HEADER = """
namespace ours {
constexpr constant int K = 3;
constant float table[2] = {1.0f, 2.0f};
using T = bfloat16_t;
struct Row {
  const device float* values;
  float at(int i) { return values[i]; }
};
template <typename Source>
inline float twice(thread Source& source, thread float* kept, threadgroup float* shared) {
  kept[0] = source.at(0);
  shared[0] = kept[0];
  return 2.0f * kept[0] + float(static_cast<T>(table[1]));
}
}  // namespace ours
"""
CLEAN_BODY = """
  threadgroup float shared[ours::K];
  float kept[1];
  ours::Row row = {x};
  const float4 four = float4(x[0], small[1], 2.0f, 3.0f);
  const float sum = metal::simd_sum(ours::twice(row, kept, shared) + four.y);
  metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
  o[thread_position_in_grid.x] = metal::precise::exp(sum) + float(as_type<uint>(shared[0]));
"""


def messages(header: str, body: str, standard: str) -> str:
    text = KernelText("f", ("x", "small"), ("o",), body, header)
    inputs = (Array((64,), mx.float32), Array((4,), mx.float32))
    kernel = generate(text, inputs, (Array((64,), mx.float32),))
    return "\n".join(lint(kernel, standard))


@pytest.mark.parametrize("standard", STANDARDS)
def test_lint(standard: str) -> None:
    pytest.importorskip("clang")
    assert messages(CLEAN_HEADER, CLEAN_BODY, standard) == ""
    for name, (header, body, message) in LINT_FAULTS.items():
        assert message in messages(header, body, standard), name


def test_lint_knows_the_older_language() -> None:
    pytest.importorskip("clang")
    newer = "if constexpr (true) { o[0] = x[0]; }"
    assert "C++17" in messages("", newer, "c++14")
    assert messages("", newer, "c++17") == ""


# Mutants ---------------------------------------------------------------------------------------
