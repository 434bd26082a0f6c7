"""Faults planted into each kernel are noticed: the tests of the kernels are no formality.

Faults are drawn from all that can be planted; those that change nothing are listed below.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import mlx.core as mx
import numpy as np
import pytest

from apertus_mlx.backend.metal.add_rms_norm import AddRMSNorm
from apertus_mlx.backend.metal.attention_input import AttentionInput
from apertus_mlx.backend.metal.best_token import BestToken
from apertus_mlx.backend.metal.kernel import Kernel
from apertus_mlx.backend.metal.qk_norm_rope import QKNormRope
from apertus_mlx.backend.metal.quantized_matvec import QuantizedMatvec
from tests import metal_harness
from tests.metal_cases import XIELU_POINTS, Exact, float64, passed_through, run
from tests.metal_harness.mutate import Trial, survivors

pytestmark = pytest.mark.skipif(
    metal_harness.missing() is not None, reason=str(metal_harness.missing())
)

F32 = mx.float32
# 1 would try all of them, which takes minutes.
EVERY = 8
# (line, fault): what the kernel computes is the same.
HARMLESS = {
    # All lanes of a simdgroup hold the same, and so do all simdgroups after a barrier.
    ("if (lane == 0) {", "'==' becomes '!='"),
    ("if (lane == 0) {", "'0' becomes '1'"),
    ("if (lane == 0 && first + r < ROWS) {", "'==' becomes '!='"),
    ("if (lane == 0 && first + r < ROWS) {", "'0' becomes '1'"),
    ("if (simdgroup == 0) {", "'==' becomes '!='"),
    ("if (simdgroup == 0) {", "'0' becomes '1'"),
    # Room for more than is used.
    ("threadgroup float bests[32];", "'32' becomes '33'"),
    ("threadgroup uint indices[32];", "'32' becomes '33'"),
    ("threadgroup float squares[32];", "'32' becomes '33'"),
    ("float values[32];", "'32' becomes '33'"),
    ("constexpr constant int PAIRS_EACH = (HALF_DIM + 31) / 32;", "'31' becomes '32'"),
    ("constexpr constant int PAIRS_EACH = (HALF_DIM + 31) / 32;", "'/' becomes '*'"),
    ("constexpr constant int ROWS_EACH = 4;", "'4' becomes '5'"),
    ("constexpr constant int ROWS_EACH = 2;", "'2' becomes '3'"),
    # Places of bits in words that come out the same for the width at hand.
    ("uint value = held[i * BITS / 32] >> shift;", "'32' becomes '33'"),
    ("value |= held[i * BITS / 32 + 1] << (32 - shift);", "'32' becomes '33'"),
    # Work that is done in vain: another condition keeps its result out.
    ("for (int i = 0; i < each; i++) {", "'<' becomes '<='"),
    ("for (int i = 0; i < PAIRS_EACH; i++) {", "'<' becomes '<='"),
    ("for (int r = 0; r < ROWS_EACH; r++) {", "'<' becomes '<='"),
    ("if (first >= apertus::ROWS) {", "'>=' becomes '>'"),
    ("return;", "'return;' becomes ';'"),
    ("index = lane < uint(simdgroups) ? indices[lane] : uint(COUNT);", "'<' becomes '<='"),
    ("constexpr bool all_tiles_full = ROWS % (SIMDGROUPS * ROWS_EACH) == 0;", "'%' becomes '/'"),
    ("constexpr bool all_tiles_full = ROWS % (SIMDGROUPS * ROWS_EACH) == 0;", "'0' becomes '1'"),
    ("if (simdgroup == 0 && lane == 0) {", "'==' becomes '!='"),
    ("if (simdgroup == 0 && lane == 0) {", "'0' becomes '1'"),
    # Terms below the precision of float32.
    ("float p = 1.0f / 479001600.0f;", "'1.0f' becomes '1.5f'"),
    ("float p = 1.0f / 479001600.0f;", "'479001600.0f' becomes '718502400.0f'"),
    ("p = metal::fma(p, x, 1.0f / 39916800.0f);", "'1.0f' becomes '1.5f'"),
    ("p = metal::fma(p, x, 1.0f / 39916800.0f);", "'39916800.0f' becomes '59875200.0f'"),
    ("p = metal::fma(p, x, 1.0f / 3628800.0f);", "'1.0f' becomes '1.5f'"),
    ("p = metal::fma(p, x, 1.0f / 3628800.0f);", "'3628800.0f' becomes '5443200.0f'"),
    # Where both branches agree.
    ("if (x > 0.0f) {", "'>' becomes '>='"),
    ("if (x < -1.0f) {", "'<' becomes '<='"),
    ("if (x < -1.0f) {", "'1.0f' becomes '1.5f'"),
    ("const float step = x > eps ? eps - x : 0.0f;", "'>' becomes '>='"),
}

# A head's rows always fill its threadgroup; no row is past the end.
HARMLESS_IN_ATTENTION_INPUT = {
    ("constexpr constant int ROWS = 128;", "'128' becomes '129'"),
    ("constexpr constant int SIMDGROUPS = 8;", "'8' becomes '9'"),
    ("constexpr bool all_tiles_full = ROWS % (SIMDGROUPS * ROWS_EACH) == 0;", "'==' becomes '!='"),
}


def trial(
    kernel: Kernel,
    inputs: Sequence[mx.array] | None = None,
    size: Exact | None = None,
    error: float = 2e-6,
) -> Trial:
    """A float32 run in which nothing may be off by more than `error` of `size`, or the largest."""
    inputs = kernel.trial(seed=1) if inputs is None else inputs
    expected = kernel.exact(inputs)

    def is_right(outputs: list[mx.array]) -> bool:
        for output, exact in zip(outputs, expected, strict=True):
            if output.dtype == mx.uint32:
                if output.tolist() != exact.tolist():
                    return False
            else:
                limit = error * (np.max(np.abs(exact)) if size is None else size)
                # Written so that NaN is wrong.
                if not np.all(np.abs(float64(output) - exact) <= limit):
                    return False
        return True

    return Trial(kernel, inputs, is_right)


def best_of(count: int, *tops: int) -> Trial:
    """Negative peaks, of which those at `tops` are the largest."""
    peaks = -1 - (mx.arange(count) % 7).astype(F32)
    for top in tops:
        peaks[top] = -0.5
    return trial(BestToken(count), [peaks, (3 * mx.arange(count) + 5).astype(mx.uint32)])


def small_norm(kernel: AddRMSNorm, rows: int) -> Trial:
    """Several rows, so small that eps matters."""
    residual, update, weight = kernel.trial(seed=2)
    scale = 1e-3 * mx.arange(1, rows + 1).reshape(rows, 1, 1)
    return trial(kernel, [residual * scale, update * scale, weight])


def small_qkv(kernel: QKNormRope) -> Trial:
    qkv, *rest = kernel.trial(seed=3)
    return trial(kernel, [1e-3 * qkv, *rest])


def xielu_points() -> Trial:
    inputs = passed_through(XIELU_POINTS, F32, bits=5)
    kernel = QuantizedMatvec(5, 32, 32, len(XIELU_POINTS), F32, epilogue="xielu")
    x = float64(inputs[3]).reshape(1, 1, -1)
    bent = np.where(x > 0, x * x, np.minimum(x * x / 2, -x) + np.maximum(x + 1e-6, 0))
    slopes = mx.array([170.0, 170.5, 0.5, -1e-6, 0, 0, 0, 0])
    return trial(kernel, [*inputs, slopes], 170 * bent + np.abs(x) / 2, 5e-7)


def peaks_with_ties(bits: int, tile: tuple[int, int]) -> Trial:
    """The best row six times: twice in a simdgroup, in a tile's simdgroups, in other tiles."""
    kernel = QuantizedMatvec(bits, 32, 1088, 45, F32, "rms_norm", "peaks", tile=tile)
    x, words, scales, biases, norm = kernel.trial(seed=5)
    biases[4] = biases[4] + 1
    for row in (5, 8, 11, 33, 41):
        words[row], scales[row], biases[row] = words[4], scales[4], biases[4]
    return trial(kernel, [1e-3 * mx.abs(x), words, scales, biases, norm])


FAMILIES = {
    "best_token": lambda: [
        best_of(40, 33),
        best_of(40, *range(40)),
        trial(BestToken(40), [mx.full((40,), -math.inf), mx.arange(1, 41).astype(mx.uint32)]),
        best_of(1100, 1095),
        best_of(1100, 1024),
        best_of(1100, 0, 1024),
    ],
    "add_rms_norm": lambda: [
        small_norm(AddRMSNorm(144, F32), rows=3),
        trial(AddRMSNorm(1100, F32)),
    ],
    "qk_norm_rope": lambda: [
        trial(QKNormRope(4, 2, 80, F32)),
        small_qkv(QKNormRope(4, 2, 64, F32)),
    ],
    "matvec_xielu": lambda: [
        xielu_points(),
        trial(QuantizedMatvec(5, 64, 1088, 13, F32, epilogue="xielu", tile=(2, 4))),
    ],
    "norm_matvec_peaks": lambda: [peaks_with_ties(3, (2, 2)), peaks_with_ties(5, (4, 8))],
    "attention_input": lambda: [
        trial(AttentionInput(3, 32, 1088, 2, 1, 32, F32, rows_each=4)),
        trial(AttentionInput(5, 64, 128, 3, 1, 80, F32, rows_each=8)),
    ],
    "matvec_residual": lambda: [
        trial(QuantizedMatvec(3, 128, 2176, 13, F32, epilogue="residual", tile=(2, 2)))
    ],
}


# One family a day shows that faults are noticed at all; each of the others takes long.
@pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, marks=() if family == "add_rms_norm" else pytest.mark.nightly)
        for family in FAMILIES
    ],
)
def test_planted_faults_are_noticed(family: str) -> None:
    trials = FAMILIES[family]()
    for each in trials:
        unchanged = run(each.kernel, each.inputs)
        assert each.is_right(unchanged)
    unnoticed = {
        (mutant.line.strip(), mutant.what.split(": ", 1)[1])
        for mutant in survivors(trials, every=EVERY)
    }
    more = HARMLESS_IN_ATTENTION_INPUT if family == "attention_input" else set()
    assert unnoticed <= HARMLESS | more
