"""Numbers of a head to codes in MLX's affine format, with a search for the best range.

`mx.quantize` makes zero representable and takes the whole range of a group. Neither serves here:
a slightly narrower range has the smaller squared error, and codes are rounded with the scale and
bias as they are stored.
"""

from __future__ import annotations

import mlx.core as mx

from apertus_mlx.cache.segments import Codes

# How much of a group's range the codes may leave out at either end.
SHRINKS = (0.0, 0.03, 0.06, 0.1, 0.14, 0.18)
WORD_BITS = 32


def quantize(x: mx.array, bits: int, group_size: int) -> Codes:
    """Quantize `x` `[B, heads, S, head_dim]` along its last axis.

    Scales and biases are stored in the type of `x` where that has 16 bits, else as bfloat16.
    """
    stored = x.dtype if x.dtype.size == 2 else mx.bfloat16
    groups = x.astype(mx.float32).reshape(*x.shape[:-1], -1, group_size)
    low = mx.min(groups, axis=-1, keepdims=True)
    high = mx.max(groups, axis=-1, keepdims=True)
    top = (1 << bits) - 1
    best: tuple[mx.array, ...] | None = None
    for shrink in SHRINKS if bits < 8 else SHRINKS[:1]:
        margin = (high - low) * (shrink / 2)
        scale = ((high - low - 2 * margin) / top).astype(stored)
        bias = (low + margin).astype(stored)
        wide = scale.astype(mx.float32)
        step = mx.where(wide == 0, 1.0, wide)
        offset = bias.astype(mx.float32)
        codes = mx.clip(mx.round((groups - offset) / step), 0, top)
        error = mx.sum(mx.square(codes * wide + offset - groups), axis=-1, keepdims=True)
        found = (error, codes, scale, bias)
        if best is None:
            best = found
        else:
            better = error < best[0]
            best = tuple(mx.where(better, new, old) for new, old in zip(found, best, strict=True))
    assert best is not None
    _, codes, scale, bias = best
    words = pack(codes.reshape(x.shape).astype(mx.uint32), bits)
    return Codes(words, scale.squeeze(-1), bias.squeeze(-1), bits, group_size)


def pack(codes: mx.array, bits: int) -> mx.array:
    """Pack codes below `2^bits` along the last axis: a little-endian stream of 32-bit words."""
    if WORD_BITS % bits == 0:
        per_word = WORD_BITS // bits
        shifts = mx.arange(0, WORD_BITS, bits, dtype=mx.uint32)
        parted = codes.reshape(*codes.shape[:-1], -1, per_word)
        return mx.sum(mx.left_shift(parted, shifts), axis=-1).astype(mx.uint32)
    # 32 codes are exactly `bits` words; a code may lie across two of them.
    parted = codes.reshape(*codes.shape[:-1], -1, 1, WORD_BITS)
    first_bit = mx.arange(WORD_BITS)[None] * bits - mx.arange(bits)[:, None] * WORD_BITS
    inside = (first_bit > -bits) & (first_bit < WORD_BITS)
    left = mx.clip(first_bit, 0, WORD_BITS - 1).astype(mx.uint32)
    right = mx.clip(-first_bit, 0, WORD_BITS - 1).astype(mx.uint32)
    pieces = mx.right_shift(mx.left_shift(parted, left), right)
    words = mx.sum(mx.where(inside, pieces, mx.zeros_like(pieces)), axis=-1).astype(mx.uint32)
    return words.reshape(*codes.shape[:-1], -1)
