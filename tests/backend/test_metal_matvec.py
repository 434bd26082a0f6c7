"""The fused quantized matvec, run from the text that MLX gets, against float64.

The text is put together from a vector (plain or normalized), the product and a store (plain,
xIELU, residual or peaks), with constants for columns, rows, bits, group, type and tile. For each
place of the released models, that is each vector, store and number of columns together, every
released width runs, and with the widths every type. Tiles and rows are drawn so that each meets
every width, type, vector and store. Other groups and widths follow on places with few columns.
Rows change no more of a text than its bounds: 37 fill no tile, 32 fill them all.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from functools import cache
from itertools import combinations, product
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from apertus_mlx.backend.metal.best_token import BestToken
from apertus_mlx.backend.metal.quantized_matvec import (
    HARD_SLOPES,
    TILES,
    Epilogue,
    Prologue,
    QuantizedMatvec,
    Tile,
)
from apertus_mlx.quant.spec import QuantSpec
from tests import metal_harness
from tests.daily import every, every_row
from tests.metal_cases import (
    DTYPES,
    HALF_ULP,
    RELEASED,
    RELEASED_BITS,
    XIELU_POINTS,
    Exact,
    error,
    errors,
    float64,
    needed,
    passed_through,
    run,
)

pytestmark = pytest.mark.skipif(
    metal_harness.missing() is not None, reason=str(metal_harness.missing())
)

FEW_ROWS = (32, 37)
Place = tuple[Prologue, Epilogue, int]


@cache
def released_places() -> tuple[Place, ...]:
    kernels = [k for name in RELEASED for k in needed(name, QuantSpec(4, 64), mx.bfloat16)]
    matvecs = [k for k in kernels if isinstance(k, QuantizedMatvec)]
    return tuple(dict.fromkeys((k.prologue, k.epilogue, k.columns) for k in matvecs))


def covering() -> tuple[QuantizedMatvec, ...]:
    turns = random.Random(0)
    return tuple(
        QuantizedMatvec(
            bits,
            64,
            columns,
            turns.choice(FEW_ROWS),
            DTYPES[(i + j) % 3],
            prologue,
            epilogue,
            tile=turns.choice(TILES),
        )
        for i, (prologue, epilogue, columns) in enumerate(released_places())
        for j, bits in enumerate(RELEASED_BITS)
    )


def other_formats() -> list[QuantizedMatvec]:
    formats = [(bits, group) for bits in (2, 3, 4, 5, 6, 8) for group in (32, 128)]
    formats += [(5, 64), (8, 64)]
    stores: tuple[Epilogue, ...] = ("xielu", "residual", "peaks", "none")
    return [
        QuantizedMatvec(
            bits,
            group,
            (128, 1024, 384)[i % 3],
            FEW_ROWS[i % 2],
            DTYPES[(i + i // 3) % 3],
            ("rms_norm", "none")[i // 2 % 2],
            stores[i % 4],
            tile=TILES[i % 6],
        )
        for i, (bits, group) in enumerate(formats)
    ]


def test_covering_set_covers() -> None:
    cases = covering()
    parts: dict[str, Callable[[QuantizedMatvec], Any]] = {
        "place": lambda k: (k.prologue, k.epilogue, k.columns),
        "pieces": lambda k: (k.prologue, k.epilogue),
        "bits": lambda k: k.bits,
        "dtype": lambda k: k.dtype,
        "tile": lambda k: k.tile,
        "rows": lambda k: k.rows,
    }
    pairs = [("place", "bits"), ("place", "dtype"), *combinations(list(parts)[1:], 2)]
    for pair in pairs:
        first, second = (parts[part] for part in pair)
        wanted = len(set(map(first, cases))) * len(set(map(second, cases)))
        assert len({(first(case), second(case)) for case in cases}) == wanted, pair


@pytest.mark.parametrize(
    "kernel", [*every(13, covering()), *every(5, other_formats())], ids=lambda k: k.key
)
def test_matvec(kernel: QuantizedMatvec) -> None:
    inputs = kernel.trial(seed=1)
    assert max(errors(kernel, inputs, run(kernel, inputs))) <= kernel.tolerance


@pytest.mark.parametrize(
    "pieces", [("rms_norm", "none"), ("rms_norm", "xielu"), ("none", "residual")]
)
def test_matvec_in_full_size(pieces: tuple[Prologue, Epilogue]) -> None:
    kernel = next(
        kernel
        for kernel in needed("0.5B", QuantSpec(4, 64), mx.bfloat16)
        if isinstance(kernel, QuantizedMatvec) and (kernel.prologue, kernel.epilogue) == pieces
    )
    inputs = kernel.trial(seed=2)
    outputs = run(kernel, inputs, schedules=metal_harness.SCHEDULES[2:])
    assert max(errors(kernel, inputs, outputs)) <= kernel.tolerance


@pytest.mark.nightly
def test_whole_head_finds_the_token() -> None:
    kernels = needed("0.5B", QuantSpec(2, 64), mx.bfloat16)
    head = next(k for k in kernels if isinstance(k, QuantizedMatvec) and k.epilogue == "peaks")
    inputs = head.trial(seed=3)
    logits, peaks, tokens = run(head, inputs, schedules=metal_harness.SCHEDULES[:1])
    assert max(errors(head, inputs, [logits, peaks, tokens])) <= head.tolerance
    best = next(k for k in kernels if k == BestToken(head.tiles))
    (token,) = run(best, [peaks, tokens])
    assert token.shape == (1,)
    assert token.item() == mx.argmax(logits).item()


@pytest.mark.parametrize("kernel", every(9, other_formats()), ids=lambda k: k.key)
def test_contraction_and_another_order_of_sums_stay_within_tolerance(
    kernel: QuantizedMatvec,
) -> None:
    inputs = kernel.trial(seed=4)
    outputs = run(
        kernel,
        inputs,
        contracts=True,
        reduces_pairwise=True,
        schedules=metal_harness.SCHEDULES[:1],
    )
    assert max(errors(kernel, inputs, outputs)) <= kernel.tolerance


@pytest.mark.parametrize(
    "kernel", [k for k in covering() if k.columns == 1024], ids=lambda k: k.key
)
def test_exact_is_what_plain_mlx_computes(kernel: QuantizedMatvec) -> None:
    """In float32, where MLX is precise: the formulas of two implementations agree."""
    kernel = QuantizedMatvec(
        kernel.bits, 64, 1024, kernel.rows, mx.float32, kernel.prologue, kernel.epilogue
    )
    inputs = kernel.trial(seed=5)
    plain = kernel.plain(inputs)
    assert max(errors(kernel, inputs, plain)) <= 4e-6
    if kernel.epilogue == "peaks":
        assert plain[2].tolist() == kernel.exact(inputs)[2].tolist()


@pytest.mark.parametrize(
    ("bits", "dtype"), every_row(3, product([2, 3, 4, 5, 6], [mx.bfloat16, mx.float16])), ids=str
)
def test_matvec_is_twice_as_accurate_as_stock(bits: int, dtype: mx.Dtype) -> None:
    """MLX's `qmv_fast` adds up x for the bias term in 16 bits, 4 or 8 values at a time."""
    columns, group = 1024, 64
    rng = np.random.default_rng(bits)
    x = mx.array(rng.standard_normal((1, 1, columns)), dtype)
    dense = mx.array(rng.standard_normal((64, columns)) * columns**-0.5, mx.float32)
    words, *scales_biases = mx.quantize(dense, group, bits)
    scales, biases = (part.astype(dtype) for part in scales_biases)
    kernel = QuantizedMatvec(bits, group, columns, 64, dtype)
    (exact,) = kernel.exact([x, words, scales, biases])
    ours = error(run(kernel, [x, words, scales, biases])[0], exact)

    # As favourable as can be: all but those sums and the last rounding is exact.
    terms = 8 if bits in (3, 5) else 4
    parts = x.reshape(-1, terms)
    sums = parts[:, 0]
    for i in range(1, terms):
        sums = (sums + parts[:, i]).astype(dtype)
    lost = float64(parts).sum(axis=1) - float64(sums)
    lost_in_group = lost.reshape(columns // group, -1).sum(axis=1)
    stock = error(mx.array(exact - float64(biases) @ lost_in_group, dtype), exact)
    assert ours <= 0.6 * HALF_ULP[dtype]
    assert 2 * ours <= stock


@pytest.mark.parametrize(
    ("dtype", "epilogue"),
    every_row(5, zip(DTYPES * 4, ("none", "xielu", "residual", "peaks") * 3, strict=True)),
    ids=str,
)
def test_matvec_of_zero_and_of_one_outlier(epilogue: Epilogue, dtype: mx.Dtype) -> None:
    kernel = QuantizedMatvec(4, 64, 1024, 37, dtype, "rms_norm", epilogue)
    x, *rest = kernel.trial(seed=6)
    outlier = mx.zeros_like(x)
    outlier[0, 0, 777] = 3e4
    inputs = [outlier, *rest]
    assert max(errors(kernel, inputs, run(kernel, inputs))) <= kernel.tolerance
    inputs = [mx.zeros_like(x), *rest]
    y = float64(run(kernel, inputs)[0])
    # xIELU(0) is alpha_n expm1(eps); all else is 0, or the residual.
    assert np.allclose(y, kernel.exact(inputs)[0], rtol=2 * HALF_ULP[dtype], atol=0)


# Values that come through the product unchanged --------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "slopes",
    [HARD_SLOPES, (170.0, 170.5, 0.5, -1e-6), (0.8, 0.8, 0.5, -1e-6), (1e-3, 0.5, 0.5, -9.984e-7)],
    ids=str,
)
def test_xielu(slopes: tuple[float, ...], dtype: mx.Dtype) -> None:
    inputs = passed_through(XIELU_POINTS, dtype)
    kernel = QuantizedMatvec(4, 32, 32, len(XIELU_POINTS), dtype, epilogue="xielu")
    (y,) = run(kernel, [*inputs, mx.array(slopes + (0.0,) * 4)])
    x = float64(inputs[3][:, 0])
    alpha_p, alpha_n, beta, eps = np.array(slopes, np.float32).astype(np.float64)
    bent = np.where(x > 0, alpha_p * x * x, alpha_n * (np.expm1(np.minimum(x, eps)) - x))
    exact = bent + beta * x
    # The two terms may cancel: their own sizes bound the error, not that of their sum.
    limit = 4 * 2.0**-24 * (np.abs(bent) + np.abs(beta * x)) + HALF_ULP[dtype] * np.abs(exact)
    # Half of the smallest step of the type.
    limit += {mx.float16: 2.0**-25, mx.bfloat16: 2.0**-134, mx.float32: 2.0**-150}[dtype]
    result = float64(y).reshape(-1)
    fits = np.abs(exact) < float(mx.finfo(dtype).max)
    assert np.all(np.abs(result - exact)[fits] <= limit[fits])
    assert np.all(np.isinf(result[~fits]))


def test_xielu_of_infinity_and_nan() -> None:
    inputs = passed_through([math.inf, -math.inf, math.nan, *range(5)], mx.float32)
    kernel = QuantizedMatvec(4, 32, 32, 8, mx.float32, epilogue="xielu")
    (y,) = run(kernel, [*inputs, mx.array(HARD_SLOPES + (0.0,) * 4)])
    positive, negative, nan = y.reshape(-1).tolist()[:3]
    assert positive == math.inf
    # Of minus infinity the formula is infinity minus infinity.
    assert math.isnan(negative)
    assert math.isnan(nan)


def lowest_argmax(logits: Exact) -> int:
    return int(np.argmax(np.where(np.isnan(logits), -np.inf, logits)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tile", every(6, TILES), ids=str)
def test_peaks_are_those_of_the_rounded_logits(tile: Tile, dtype: mx.Dtype) -> None:
    rows = 325
    kernel = QuantizedMatvec(2, 32, 32, rows, dtype, epilogue="peaks", tile=tile)
    # Few different values: most are ties, in 16 bits only once they are rounded.
    ties = np.random.default_rng(rows).integers(-3, 3, rows) / 3 + 1e-7 * np.arange(rows)
    with_nan = ties.copy()
    with_nan[::3] = math.nan
    nothing = np.full(rows, -math.inf)
    nothing[1::2] = math.nan
    for sums in (ties, with_nan, nothing):
        x, words, scales, _ = passed_through(sums, mx.float32, bits=2)
        # In float32 until here, so that rounding decides what is equal.
        inputs = [x.astype(dtype), words, scales.astype(dtype), mx.array(sums[:, None], dtype)]
        logits, peaks, tokens = run(kernel, inputs, schedules=metal_harness.SCHEDULES[1:])
        flat, step = float64(logits).reshape(-1), kernel.tile[0] * kernel.tile[1]
        tiles = [(start, flat[start : start + step]) for start in range(0, rows, step)]
        assert tokens.tolist() == [start + lowest_argmax(part) for start, part in tiles]
        best = [np.max(part, initial=-np.inf, where=~np.isnan(part)) for _, part in tiles]
        assert peaks.tolist() == best
        (token,) = run(BestToken(kernel.tiles), [peaks, tokens])
        assert token.item() == lowest_argmax(flat)


def test_peaks_compare_what_is_stored() -> None:
    """A sum that is larger, but not once it is rounded, does not win."""
    kernel = QuantizedMatvec(2, 32, 32, 8, mx.bfloat16, epilogue="peaks")
    inputs = passed_through([1.0, *[0.0] * 6, 1.0], mx.bfloat16, bits=2)
    # One more column's worth in the last row, lost in rounding 1 + 2^-10.
    inputs[1][7, 0] = mx.array(1, mx.uint32)
    inputs[2][7, 0] = 2.0**-5
    logits, peaks, tokens = run(kernel, inputs)
    assert logits.reshape(-1).tolist() == [1.0, *[0.0] * 6, 1.0]
    assert (peaks.tolist(), tokens.tolist()) == ([1.0], [0])
