"""Packing against big integers, and the small floats against their definitions."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apertus_mlx.quant.float_formats import e2m1_values, e4m3_values
from apertus_mlx.quant.packing import aligned_width, dense_width, pack, unpack, unpack_aligned

BITS = (2, 3, 4, 5, 6, 8)


@given(
    bits=st.sampled_from(BITS),
    rows=st.integers(1, 5),
    blocks=st.integers(1, 5),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=60, deadline=None)
def test_dense_rows_are_one_long_number(bits: int, rows: int, blocks: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 1 << bits, (rows, 32 * blocks)).astype(np.uint8)
    words = pack(codes, bits)
    assert words.shape == (rows, dense_width(32 * blocks, bits))
    for row, packed in zip(codes, words, strict=True):
        number = sum(int(code) << bits * index for index, code in enumerate(row))
        assert sum(int(word) << 32 * index for index, word in enumerate(packed)) == number
    assert np.array_equal(unpack(words, bits, 32 * blocks), codes)


@given(
    bits=st.sampled_from((*BITS, 7)),
    columns=st.integers(1, 100),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=60, deadline=None)
def test_widths_that_do_not_divide(bits: int, columns: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 1 << bits, columns)
    number = sum(int(code) << bits * index for index, code in enumerate(codes))
    dense = [number >> 32 * i & 0xFFFFFFFF for i in range(dense_width(columns, bits))]
    assert np.array_equal(unpack(np.array([dense], np.uint32), bits, columns)[0], codes)
    per_word = 32 // bits
    aligned = [
        sum(int(c) << bits * i for i, c in enumerate(codes[start : start + per_word]))
        for start in range(0, columns, per_word)
    ]
    assert len(aligned) == aligned_width(columns, bits)
    assert np.array_equal(unpack_aligned(np.array([aligned], np.uint32), bits, columns)[0], codes)


@pytest.mark.parametrize("bits", BITS)
def test_mlx_packs_densely(bits: int) -> None:
    """Codes 0, 1, 2, … with scale 1 and bias 0 come back as those numbers."""
    codes = (np.arange(64) % (1 << bits)).astype(np.uint8)[None, :]
    values = mx.dequantize(
        mx.array(pack(codes, bits)), mx.ones((1, 1)), mx.zeros((1, 1)), group_size=64, bits=bits
    )
    assert np.array_equal(np.array(values), codes.astype(np.float32))


def test_e4m3_is_that_of_mlx() -> None:
    every = mx.arange(256).astype(mx.uint8)
    expected = np.array(mx.from_fp8(every, mx.float32))
    ours = e4m3_values()
    number = ~np.isnan(ours)
    assert np.flatnonzero(~number).tolist() == [0x7F, 0xFF]
    assert np.array_equal(ours[number], expected[number])


def test_e2m1_and_e8m0_are_those_of_mlx() -> None:
    codes = np.arange(32, dtype=np.uint8)[None, :] % 16
    for exponent in (1, 100, 127, 130, 250):
        scales = mx.array([[exponent]]).astype(mx.uint8)
        values = mx.dequantize(
            mx.array(pack(codes, 4)), scales, mode="mxfp4", group_size=32, bits=4, dtype=mx.float32
        )
        expected = e2m1_values()[codes].astype(float) * np.ldexp(1.0, exponent - 127)
        assert np.array_equal(np.array(values), expected.astype(np.float32))
    assert unpack(np.array([[0x21, 0x43, 0, 0]], np.uint8).view(np.uint32), 4, 4).tolist() == [
        [1, 2, 3, 4]
    ]
