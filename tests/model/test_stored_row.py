"""A row by NumPy: MLX's own numbers, bit by bit, for all codes with all scales of a format."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from apertus_mlx.checkpoint.header import TensorInfo
from apertus_mlx.model.stored_row import StoredRow
from apertus_mlx.quant.spec import AFFINE_BITS, FLOAT_MODES, QuantSpec

NAMES: dict[mx.Dtype, str] = {mx.bfloat16: "BF16", mx.float16: "F16", mx.float32: "F32"}


def stored(dtype: str, row: Any) -> TensorInfo:
    return TensorInfo("model.embed_tokens.x", dtype, (1, 1), "model.safetensors", 0, row.nbytes)


def computed(row: StoredRow, *parts: Any) -> Any:
    for target, part in zip(row.buffers, parts, strict=True):
        target[:] = np.array(part).reshape(-1).view(np.uint8)
    return row().copy()


def same_bits(found: mx.array, expected: mx.array) -> bool:
    wide = {2: mx.uint16, 4: mx.uint32}[expected.itemsize]
    return bool(mx.array_equal(found.reshape(-1).view(wide), expected.reshape(-1).view(wide)))


@pytest.mark.parametrize("mode", FLOAT_MODES)
def test_every_code_with_every_scale(mode: Any) -> None:
    bits, group = FLOAT_MODES[mode]
    # All codes in order, again and again.
    codes = (np.arange(256) % (1 << bits)).astype(np.uint8)
    packed = codes if bits == 8 else codes[::2] | codes[1::2] << 4
    scales = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 256 // group, 1)
    matrix = mx.array(np.tile(packed, (256, 1)).view(np.uint32)), mx.array(scales), None
    expected = mx.dequantize(*matrix, group, bits, mode)
    tensors = [stored("U32", packed), stored("U8", scales[0])]
    row = StoredRow(QuantSpec(bits, group, mode), tensors, mx.bfloat16)
    found = np.stack([computed(row, packed, each) for each in scales])
    assert expected.dtype == row.dtype
    assert same_bits(mx.array(found, row.dtype), expected)


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("bits", AFFINE_BITS)
def test_all_sorts_of_affine_codes(bits: int, kind: mx.Dtype) -> None:
    rng = np.random.default_rng(bits)
    for group in (32, 64, 128):
        words = rng.integers(0, 1 << 32, (1, 512 * bits // 32), np.uint32)
        parts = [mx.array(words)]
        parts += [mx.array(rng.normal(size=(1, 512 // group)), mx.float32).astype(kind)
                  for _ in range(2)]  # fmt: skip
        names = ("U32", NAMES[kind], NAMES[kind])
        tensors = [stored(*each) for each in zip(names, parts, strict=True)]
        for dtype in NAMES:
            row = StoredRow(QuantSpec(bits, group), tensors, dtype)
            found = computed(row, *(part.view(mx.uint8) for part in parts))
            own = (parts[0], *(part.astype(dtype) for part in parts[1:]))
            assert same_bits(mx.array(found, dtype), mx.dequantize(*own, group, bits))
