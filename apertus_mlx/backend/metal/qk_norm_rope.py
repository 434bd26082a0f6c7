"""QK-norm, rotary embedding and the packing of new keys and values in one kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from apertus_mlx.backend.metal import reference
from apertus_mlx.backend.metal.kernel import Exact, Kernel, KernelText, Launch
from apertus_mlx.backend.metal.text import UNIT_ROUNDOFF, specialised, type_key
from apertus_mlx.model.apertus import rotated

TRIAL_POSITION = 4095
TRIAL_THETA = 500_000.0

_SOURCE = """
  const int head = int(threadgroup_position_in_grid.y);
  device apertus::T* output = head < apertus::HEADS
      ? queries + head * apertus::HEAD_DIM
      : rows + (head - apertus::HEADS) * apertus::HEAD_DIM;
  apertus::qk_norm_rope(
      qkv + head * apertus::HEAD_DIM, q_norm, k_norm, wavelengths, position[0], head,
      thread_index_in_simdgroup, output);
"""


@dataclass(frozen=True, slots=True)
class QKNormRope(Kernel):
    """Normalized and rotated queries and keys, and values, of one position.

    Inputs: qkv with `(heads + 2 kv_heads) head_dim` elements; weights of the query and the key
    norm `[head_dim]`; wavelengths, float32 positions per radian `[head_dim / 2]`; position, int32
    `[1]`.

    Outputs: queries `[1, heads, 1, head_dim]`; rows `[1, 2 kv_heads, 1, head_dim]`, all keys, then
    all values, for one cache write.

    Rounds where `mx.fast.rms_norm` and `mx.fast.rope` do, except that the angle, less whole turns,
    is right to 4e-7 radians at any position below 2^24.
    """

    heads: int
    kv_heads: int
    head_dim: int
    dtype: mx.Dtype
    eps: float = 1e-5

    def __post_init__(self) -> None:
        # MLX hands arrays of fewer than 8 elements over in another address space.
        if self.head_dim < 16 or self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim}: the kernel wants an even one from 16")

    @property
    def place(self) -> str:
        heads = f"{self.heads}+{self.kv_heads}x{self.head_dim}"
        return f"qk_norm_rope{self.eps!r}-{heads}-{type_key(self.dtype)}"

    def text(self) -> KernelText:
        inputs = ("qkv", "q_norm", "k_norm", "wavelengths", "position")
        constants = "T HEADS KV_HEADS HEAD_DIM EPS"
        outputs = ("queries", "rows")
        return specialised(self, inputs, outputs, _SOURCE, ("qk_norm_rope",), constants)

    def launch(self, inputs: Sequence[mx.array]) -> Launch:  # noqa: ARG002 - all have one shape
        return Launch(
            grid=(32, self.heads + 2 * self.kv_heads, 1),
            threadgroup=(32, 1, 1),
            output_shapes=(
                (1, self.heads, 1, self.head_dim),
                (1, 2 * self.kv_heads, 1, self.head_dim),
            ),
            output_dtypes=(self.dtype, self.dtype),
        )

    def trial(self, seed: int) -> list[mx.array]:
        keys = mx.random.split(mx.random.key(seed), 3)
        count = (self.heads + 2 * self.kv_heads) * self.head_dim
        waves = [TRIAL_THETA ** (2 * i / self.head_dim) for i in range(self.head_dim // 2)]
        weights = [1 + 0.2 * mx.random.normal((self.head_dim,), key=key) for key in keys[1:]]
        return [
            2 * mx.random.normal((1, 1, count), self.dtype, key=keys[0]),
            *(weight.astype(self.dtype) for weight in weights),
            mx.array(waves, mx.float32),
            mx.array([TRIAL_POSITION], mx.int32),
        ]

    def plain(self, inputs: Sequence[mx.array]) -> list[mx.array]:
        qkv, q_norm, k_norm, wavelengths, position = inputs
        heads = qkv.reshape(1, -1, 1, self.head_dim)
        queries, keys, values = mx.split(heads, [self.heads, self.heads + self.kv_heads], axis=1)
        turned = [
            rotated(mx.fast.rms_norm(x, weight, self.eps), wavelengths, position[0])
            for x, weight in ((queries, q_norm), (keys, k_norm))
        ]
        return [turned[0], mx.concatenate([turned[1], values], axis=1)]

    def exact(self, inputs: Sequence[mx.array]) -> list[Exact]:
        return self.exact_heads(reference.float64(inputs[0]), inputs[1:])

    def exact_heads(self, qkv: Exact, others: Sequence[mx.array]) -> list[Exact]:
        """See `Kernel.exact`, for queries, keys and values that are exact themselves."""
        q_norm, k_norm, wavelengths, position = others
        heads = qkv.reshape(1, -1, 1, self.head_dim)
        angles = reference.float64(position) / reference.float64(wavelengths)
        cosines, sines = np.cos(angles), np.sin(angles)

        def turned(x: Exact, weight: mx.array) -> Exact:
            low, high = np.split(reference.rms_norm(x, weight, self.eps), 2, axis=-1)
            parts = [low * cosines - high * sines, low * sines + high * cosines]
            return np.concatenate(parts, axis=-1)

        last_query, last_key = self.heads, self.heads + self.kv_heads
        keys = turned(heads[:, last_query:last_key], k_norm)
        return [
            turned(heads[:, :last_query], q_norm),
            np.concatenate([keys, heads[:, last_key:]], axis=1),
        ]

    @property
    def tolerance(self) -> float:
        """Three roundings of 16-bit types.

        In float32 it is the plain form that needs as much: `mx.fast.rope` rounds its angles.
        """
        return 2 * UNIT_ROUNDOFF[self.dtype] + 1e-4
