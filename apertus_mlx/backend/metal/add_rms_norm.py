"""Residual addition and RMSNorm in one kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from apertus_mlx.backend.metal import reference
from apertus_mlx.backend.metal.kernel import Exact, Kernel, KernelText, Launch
from apertus_mlx.backend.metal.text import UNIT_ROUNDOFF, specialised, type_key

_SOURCE = """
  threadgroup float squares[32];
  const size_t start = size_t(threadgroup_position_in_grid.y) * apertus::COLUMNS;
  apertus::add_rms_norm(
      residual + start, update + start, weight, sum + start, normed + start,
      thread_index_in_threadgroup, simdgroup_index_in_threadgroup, thread_index_in_simdgroup,
      squares);
"""


@dataclass(frozen=True, slots=True)
class AddRMSNorm(Kernel):
    """`residual + update`, bit for bit, and its RMSNorm, of any number of positions.

    Inputs: residual and update `[..., columns]`, weight `[columns]`. Outputs: sum and norm, shaped
    like the residual. Rounds where `mx.fast.rms_norm` does.
    """

    columns: int
    dtype: mx.Dtype
    eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.columns < 8:
            raise ValueError(f"{self.columns} columns: the kernel wants 8 at least")

    @property
    def place(self) -> str:
        return f"add_rms_norm{self.eps!r}-{self.columns}-{type_key(self.dtype)}"

    @property
    def threads(self) -> int:
        """Threads per row: whole simdgroups, four columns each until there are 1024."""
        return min(1024, -(-self.columns // 128) * 32)

    def text(self) -> KernelText:
        inputs, outputs = ("residual", "update", "weight"), ("sum", "normed")
        files = ("add_rms_norm",)
        return specialised(self, inputs, outputs, _SOURCE, files, "T COLUMNS THREADS EPS")

    def launch(self, inputs: Sequence[mx.array]) -> Launch:
        residual = inputs[0]
        return Launch(
            grid=(self.threads, residual.size // self.columns, 1),
            threadgroup=(self.threads, 1, 1),
            output_shapes=(residual.shape, residual.shape),
            output_dtypes=(self.dtype, self.dtype),
        )

    def trial(self, seed: int) -> list[mx.array]:
        keys = mx.random.split(mx.random.key(seed), 3)
        weight = 1 + 0.1 * mx.random.normal((self.columns,), key=keys[2])
        return [
            3 * mx.random.normal((1, 1, self.columns), self.dtype, key=keys[0]),
            mx.random.normal((1, 1, self.columns), self.dtype, key=keys[1]),
            weight.astype(self.dtype),
        ]

    def plain(self, inputs: Sequence[mx.array]) -> list[mx.array]:
        residual, update, weight = inputs
        total = residual + update
        return [total, mx.fast.rms_norm(total, weight, self.eps)]

    def exact(self, inputs: Sequence[mx.array]) -> list[Exact]:
        residual, update, weight = inputs
        total = reference.float64(residual) + reference.float64(update)
        return [total, reference.rms_norm(total, weight, self.eps)]

    @property
    def tolerance(self) -> float:
        """The norm is rounded three times."""
        return 2 * UNIT_ROUNDOFF[self.dtype] + 1e-6
