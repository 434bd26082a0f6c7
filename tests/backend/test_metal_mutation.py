"""Mutants of a kernel: they follow from its text, and a good trial notices them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np
import pytest

from apertus_mlx.backend.metal.kernel import Exact, KernelText, Launch
from tests import metal_harness
from tests.metal_harness import Trial

needs_compiler = pytest.mark.skipif(
    metal_harness.missing() is not None, reason=str(metal_harness.missing())
)

COUNT, GROUP = 256, 64
FLOATS = mx.arange(COUNT).astype(mx.float32)
PLACE = "uint i = thread_position_in_grid.x, t = thread_index_in_threadgroup;\n"
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"


DOT_HEADER = """
inline float unused(float v) { return v + 1.0f; }
inline float scaled(float v) { return v * 3.0f; }
"""
DOT_BODY = """
  threadgroup float sums[2];
  const uint t = thread_index_in_threadgroup;
  float sum = 0.0f;
  for (uint i = t; i < 100; i += 64) {
    sum += a[i] * b[i];
  }
  sum = simd_sum(sum);
  if (t % 32 == 0) {
    sums[t / 32] = sum;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  o[t] = scaled(sums[0] + sums[1]) + t;
"""


@dataclass(frozen=True, slots=True)
class Dot:
    """Three times a dot product, plus the thread's number."""

    place: str = "dot"
    key: str = "dot"
    tolerance: float = 1e-6

    def text(self) -> KernelText:
        return KernelText("dot", ("a", "b"), ("o",), DOT_BODY, DOT_HEADER)

    def launch(self, inputs: Sequence[mx.array]) -> Launch:
        return Launch((64, 1, 1), (64, 1, 1), ((64,),), (mx.float32,))

    def trial(self, seed: int) -> list[mx.array]:
        return list(mx.random.normal((2, 100), key=mx.random.key(seed)))

    def plain(self, inputs: Sequence[mx.array]) -> list[mx.array]:
        return [3 * mx.sum(inputs[0] * inputs[1]) + mx.arange(64)]

    def exact(self, inputs: Sequence[mx.array]) -> list[Exact]:
        a, b = (np.array(values).astype(np.float64) for values in inputs)
        return [3 * (a @ b) + np.arange(64.0)]


def test_mutants_follow_from_the_text() -> None:
    found = metal_harness.mutants(Dot().text())
    assert found == metal_harness.mutants(Dot().text())
    assert len({(mutant.text.header, mutant.text.source) for mutant in found}) == len(found)
    assert [mutant.what for mutant in found if "barrier" in mutant.line] == [
        "body:12:3: 'threadgroup_barrier(mem_flags::mem_threadgroup);' becomes ';'"
    ]


@needs_compiler
@pytest.mark.nightly
def test_mutants_are_noticed() -> None:
    kernel, inputs = Dot(), Dot().trial(0)
    (exact,) = kernel.exact(inputs)

    def is_right(outputs: list[mx.array]) -> bool:
        error = np.linalg.norm(np.array(outputs[0]) - exact)
        return bool(error <= kernel.tolerance * np.linalg.norm(exact))

    left = metal_harness.survivors([Trial(kernel, inputs, is_right)])
    # No faults: room that nobody uses, and another lane storing the sum, which all lanes have.
    # `unused` has no machine code.
    assert {mutant.line.strip() for mutant in left} == {
        "threadgroup float sums[2];",
        "if (t % 32 == 0) {",
    }


@needs_compiler
def test_a_trial_that_notices_nothing_is_found_out() -> None:
    kernel = Dot()
    blind = Trial(kernel, kernel.trial(0), lambda outputs: True)
    assert metal_harness.survivors([blind], every=12)
    with pytest.raises(ValueError, match="dot fails its own trial"):
        metal_harness.survivors([replace(blind, is_right=lambda outputs: False)])
