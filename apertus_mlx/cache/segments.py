"""Keys or values in several parts, some of them quantized: what attention gets from a cache."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx


@dataclass(frozen=True, slots=True)
class Codes:
    """Vectors `[B, kv_heads, S, head_dim]` in MLX's affine format: `scale * code + bias`.

    `words` are the packed codes, `scales` and `biases` have one entry per group of `group_size`
    along head_dim, in a 16-bit type.
    """

    words: mx.array
    scales: mx.array
    biases: mx.array
    bits: int
    group_size: int

    @property
    def length(self) -> int:
        """Number of positions."""
        return self.words.shape[2]

    def slice(self, start: int, stop: int) -> Codes:
        """Positions `start` to `stop`."""
        words, scales, biases = (
            array[:, :, start:stop] for array in (self.words, self.scales, self.biases)
        )
        return Codes(words, scales, biases, self.bits, self.group_size)

    def dequantize(self, dtype: mx.Dtype) -> mx.array:
        """The vectors themselves."""
        return mx.dequantize(
            self.words,
            self.scales.astype(dtype),
            self.biases.astype(dtype),
            group_size=self.group_size,
            bits=self.bits,
        )


@dataclass(frozen=True, slots=True)
class Segments:
    """Parts `[B, kv_heads, S_i, head_dim]` that follow each other along the positions' axis.

    Keys that are `rotated` are to be met by queries rotated alike; scores are the same then.
    """

    parts: tuple[mx.array | Codes, ...]
    rotated: bool = False


def rotate(x: mx.array) -> mx.array:
    """Multiply by the normalized Hadamard matrix along head_dim, which is its own inverse."""
    return mx.hadamard_transform(x)
