"""All that comes before attention in one kernel: norm, projection, QK-norm, rotation, packing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from apertus_mlx.backend.metal.kernel import Exact, Kernel, KernelText, Launch
from apertus_mlx.backend.metal.qk_norm_rope import QKNormRope
from apertus_mlx.backend.metal.quantized_matvec import QuantizedMatvec
from apertus_mlx.backend.metal.text import specialised, type_key

# Rows that a simdgroup computes; a head has 16 simdgroups at most.
ROWS_EACH = (8, 4, 16)
MAX_SIMDGROUPS = 16

_SOURCE = """
  const int head = int(threadgroup_position_in_grid.y);
  threadgroup float values[apertus::HEAD_DIM];
  apertus::NormedVector vector = {x, norm, 0.0f};
  device apertus::T* output = head < apertus::HEADS
      ? queries + head * apertus::HEAD_DIM
      : rows + (head - apertus::HEADS) * apertus::HEAD_DIM;
  apertus::attention_input(
      vector, words, scales, biases, q_norm, k_norm, wavelengths, position[0], head,
      simdgroup_index_in_threadgroup, thread_index_in_simdgroup, values, output);
"""


@dataclass(frozen=True, slots=True)
class AttentionInput(Kernel):
    """`QKNormRope` of `QuantizedMatvec` with a norm before it, of one position.

    Inputs: x `[1, 1, columns]`; words, scales and biases of the joined projections of queries, keys
    and values; the weight of the norm; then those of `QKNormRope` but its first. Outputs: as there.
    """

    bits: int
    group_size: int
    columns: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: mx.Dtype
    eps: float = 1e-5
    rows_each: int = ROWS_EACH[0]

    def __post_init__(self) -> None:
        # Both refuse what they cannot compute.
        assert self.product and self.rotation
        if self.head_dim % self.rows_each or not 1 <= self.simdgroups <= MAX_SIMDGROUPS:
            raise ValueError(
                f"heads of {self.head_dim} do not divide into 1 to {MAX_SIMDGROUPS} times "
                f"{self.rows_each} rows"
            )

    @property
    def simdgroups(self) -> int:
        """Simdgroups of a threadgroup, which computes a head."""
        return self.head_dim // self.rows_each

    @property
    def rows(self) -> int:
        """Rows of the joined projections."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    @property
    def product(self) -> QuantizedMatvec:
        """The first half."""
        form = (self.bits, self.group_size, self.columns, self.rows, self.dtype)
        return QuantizedMatvec(*form, "rms_norm", eps=self.eps)

    @property
    def rotation(self) -> QKNormRope:
        """The second half."""
        return QKNormRope(self.heads, self.kv_heads, self.head_dim, self.dtype, self.eps)

    @property
    def place(self) -> str:
        heads = f"{self.heads}+2x{self.kv_heads}x{self.head_dim}"
        form = f"{self.columns}-{self.bits}bit-g{self.group_size}"
        return f"attention_input{self.eps!r}-{heads}-{form}-{type_key(self.dtype)}"

    @property
    def key(self) -> str:
        return f"{self.place}-rows{self.rows_each}"

    def text(self) -> KernelText:
        weights = ("words", "scales", "biases", "norm", "q_norm", "k_norm")
        return specialised(
            self,
            ("x", *weights, "wavelengths", "position"),
            ("queries", "rows"),
            _SOURCE,
            ("normed_vector", "quantized_matvec", "qk_norm_rope", "attention_input"),
            "T BITS GROUP_SIZE COLUMNS ROWS SIMDGROUPS ROWS_EACH HEADS KV_HEADS HEAD_DIM EPS",
        )

    def launch(self, inputs: Sequence[mx.array]) -> Launch:
        rotation = self.rotation.launch(inputs)
        return Launch(
            grid=(32, self.simdgroups * (self.heads + 2 * self.kv_heads), 1),
            threadgroup=(32, self.simdgroups, 1),
            output_shapes=rotation.output_shapes,
            output_dtypes=rotation.output_dtypes,
        )

    def trial(self, seed: int) -> list[mx.array]:
        return [*self.product.trial(seed), *self.rotation.trial(seed)[1:]]

    def plain(self, inputs: Sequence[mx.array]) -> list[mx.array]:
        return self.rotation.plain([*self.product.plain(inputs[:5]), *inputs[5:]])

    def exact(self, inputs: Sequence[mx.array]) -> list[Exact]:
        return self.rotation.exact_heads(self.product.exact(inputs[:5])[0], inputs[5:])

    @property
    def tolerance(self) -> float:
        return self.product.tolerance + self.rotation.tolerance
