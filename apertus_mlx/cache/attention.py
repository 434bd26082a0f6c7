"""Attention over what a cache gives: arrays, or several parts of which some are quantized.

Scores of all parts meet in one softmax, so the result is exactly that of attention over the
dequantized whole. Nothing but a block of it is ever dequantized at a time.
"""

from __future__ import annotations

from functools import partial

import mlx.core as mx

from apertus_mlx.cache.protocol import Mask, Stored
from apertus_mlx.cache.segments import Codes, Segments, rotate

# Up to so many query rows a key head, codes are multiplied as they are.
MAX_ROWS_ON_CODES = 16
# Positions that are dequantized at a time when more queries come.
BLOCK = 512
# Scores that are computed at a time; more queries come in several blocks.
MAX_SCORES_BYTES = 2**23


def attend(queries: mx.array, keys: Stored, values: Stored, scale: float, mask: Mask) -> mx.array:
    """Scaled dot-product attention of `queries` `[B, heads, L, head_dim]`; the same shape."""
    if isinstance(keys, tuple):
        assert isinstance(values, tuple)
        each = zip(mx.split(queries, len(keys)), keys, values, strict=True)
        return mx.concatenate([attend(*row, scale, mask) for row in each])
    if isinstance(keys, mx.array):
        assert isinstance(values, mx.array)
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)
    assert isinstance(values, Segments)
    if keys.rotated:
        queries = rotate(queries)
    if len(keys.parts) == 1 and len(values.parts) == 1:
        only_keys, only_values = keys.parts[0], values.parts[0]
        if isinstance(only_keys, mx.array) and isinstance(only_values, mx.array):
            return mx.fast.scaled_dot_product_attention(
                queries, only_keys, only_values, scale=scale, mask=mask
            )
    batch, heads, length, _ = queries.shape
    positions = sum(_length(part) for part in keys.parts)
    step = max(1, MAX_SCORES_BYTES // (batch * heads * positions * 4))
    if isinstance(mask, str):
        mask = mx.arange(positions - length, positions)[:, None] >= mx.arange(positions)[None]
    some = partial(_attend, keys=keys.parts, values=values.parts, scale=scale)
    if length <= step:
        return some(queries, mask=mask)
    outputs: list[mx.array] = []
    for start in range(0, length, step):
        block = queries[:, :, start : start + step]
        if outputs:
            # One block after the other, or all their scores would be there at the same time.
            block = mx.depends(block, outputs[-1])
        block_mask = None if mask is None else mask[start : start + step]
        outputs.append(some(block, mask=block_mask))
    return mx.concatenate(outputs, axis=2)


def _attend(
    queries: mx.array,
    keys: tuple[mx.array | Codes, ...],
    values: tuple[mx.array | Codes, ...],
    scale: float,
    mask: mx.array | None,
) -> mx.array:
    batch, heads, length, head_dim = queries.shape
    key_heads = _heads(keys[0])
    # Query heads that share a key head stand below each other: one product for all of them.
    rows = (queries * scale).reshape(batch, key_heads, -1, head_dim)
    scores = mx.concatenate([_scores(rows, part) for part in keys], axis=-1)
    if mask is not None:
        apart = scores.reshape(batch, heads, length, -1)
        scores = mx.where(mask, apart, mx.finfo(scores.dtype).min).reshape(scores.shape)
    weights = mx.softmax(scores, axis=-1, precise=True)
    output, start = None, 0
    for part in values:
        stop = start + _length(part)
        product = _weighted(weights[..., start:stop], part)
        output = product if output is None else output + product
        start = stop
    assert output is not None
    return output.reshape(batch, heads, length, head_dim)


def _scores(rows: mx.array, keys: mx.array | Codes) -> mx.array:
    if isinstance(keys, mx.array):
        return rows @ keys.swapaxes(-1, -2)
    if rows.shape[2] <= MAX_ROWS_ON_CODES:
        return _product(rows, keys, transpose=True)
    blocks = [
        rows @ keys.slice(start, start + BLOCK).dequantize(rows.dtype).swapaxes(-1, -2)
        for start in range(0, keys.length, BLOCK)
    ]
    return blocks[0] if len(blocks) == 1 else mx.concatenate(blocks, axis=-1)


def _weighted(weights: mx.array, values: mx.array | Codes) -> mx.array:
    if isinstance(values, mx.array):
        return weights @ values
    if weights.shape[2] <= MAX_ROWS_ON_CODES:
        return _product(weights, values, transpose=False)
    output = None
    for start in range(0, values.length, BLOCK):
        stop = start + BLOCK
        product = weights[..., start:stop] @ values.slice(start, stop).dequantize(weights.dtype)
        output = product if output is None else output + product
    assert output is not None
    return output


def _product(x: mx.array, codes: Codes, transpose: bool) -> mx.array:
    return mx.quantized_matmul(
        x,
        codes.words,
        codes.scales.astype(x.dtype),
        codes.biases.astype(x.dtype),
        transpose=transpose,
        group_size=codes.group_size,
        bits=codes.bits,
    )


def _length(part: mx.array | Codes) -> int:
    return part.length if isinstance(part, Codes) else part.shape[2]


def _heads(part: mx.array | Codes) -> int:
    return (part.words if isinstance(part, Codes) else part).shape[1]
