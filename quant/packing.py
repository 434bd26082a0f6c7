"""Codes of 2 to 8 bits in 32-bit words, in the ways that checkpoints pack them. NumPy only.

Dense: element i of a row takes the bits from `i * bits` on, lowest first, across word borders; MLX
packs so, and compressed-tensors since May 2026. Word-aligned: each word holds `32 // bits` whole
elements and leaves the rest of its bits empty; the two are the same for 2, 4 and 8 bits.
"""

from __future__ import annotations

import numpy as np

from apertus_mlx.quant.arrays import Codes, Packed


def pack(codes: Codes, bits: int) -> Packed:
    """Pack `[rows, columns]` densely into `[rows, columns * bits / 32]`; columns divide by 32."""
    rows, columns = codes.shape
    lanes = codes.reshape(rows, columns // 32, 32)
    packed = np.zeros((rows, columns // 32, bits), np.uint32)
    for lane in range(32):
        word, shift = divmod(lane * bits, 32)
        value = lanes[:, :, lane].astype(np.uint32)
        packed[:, :, word] |= value << np.uint32(shift)
        if shift + bits > 32:
            packed[:, :, word + 1] |= value >> np.uint32(32 - shift)
    return packed.reshape(rows, columns // 32 * bits)


def unpack(packed: Packed, bits: int, columns: int) -> Codes:
    """The first `columns` codes of densely packed rows `[rows, words]`."""
    rows = len(packed)
    stream = np.ascontiguousarray(packed).view(np.uint8)
    blocks = -(-stream.shape[1] // bits)
    if stream.shape[1] % bits:
        stream = np.pad(stream, ((0, 0), (0, blocks * bits - stream.shape[1])))
    # Eight codes take `bits` bytes.
    grouped = stream.reshape(rows, blocks, bits)
    codes = np.empty((rows, blocks, 8), np.uint8)
    for lane in range(8):
        byte, shift = divmod(lane * bits, 8)
        value = grouped[:, :, byte] >> shift
        if shift + bits > 8:
            value = value | grouped[:, :, byte + 1] << (8 - shift)
        codes[:, :, lane] = value & ((1 << bits) - 1)
    return codes.reshape(rows, blocks * 8)[:, :columns]


def dense_width(columns: int, bits: int) -> int:
    """Words in a densely packed row."""
    return -(-columns * bits // 32)


def aligned_width(columns: int, bits: int) -> int:
    """Words in a row whose words hold whole elements only."""
    return -(-columns // (32 // bits))


def unpack_aligned(packed: Packed, bits: int, columns: int) -> Codes:
    """The first `columns` codes of rows whose words hold `32 // bits` whole elements each."""
    rows, width = packed.shape
    per_word = 32 // bits
    codes = np.empty((rows, width, per_word), np.uint8)
    mask = np.uint32((1 << bits) - 1)
    for lane in range(per_word):
        codes[:, :, lane] = packed >> np.uint32(lane * bits) & mask
    return codes.reshape(rows, width * per_word)[:, :columns]
