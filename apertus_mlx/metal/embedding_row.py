"""One row of a quantized embedding, without gathering its parts first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from apertus_mlx.metal import reference
from apertus_mlx.metal.kernel import Exact, KernelText, Launch
from apertus_mlx.metal.quantized_matvec import unfit
from apertus_mlx.metal.text import UNIT_ROUNDOFF, header, name, type_key
from quant.spec import QuantSpec

TRIAL_ROWS = 1024

_SOURCE = """
  apertus::embedding_value(
      int(token[0]), words, scales, biases, int(thread_position_in_grid.x), row);
"""


@dataclass(frozen=True, slots=True)
class EmbeddingRow:
    """The dequantized row of one token.

    Inputs: token, int32 or uint32, `[1]` or `[1, 1]`, below the number of rows; words, scales and
    biases of the whole table. Output: `[1, 1, columns]`.

    `scale * code + bias` is computed in float32 and rounded once; `mx.dequantize` rounds the
    product to `dtype` too, so the two differ by that rounding at most.
    """

    bits: int
    group_size: int
    columns: int
    dtype: mx.Dtype

    def __post_init__(self) -> None:
        problem = unfit(QuantSpec(self.bits, self.group_size), TRIAL_ROWS, self.columns)
        if problem:
            raise ValueError(problem)

    @property
    def place(self) -> str:
        """See `Kernel.place`."""
        form = f"{self.columns}-{self.bits}bit-g{self.group_size}"
        return f"embedding_row-{form}-{type_key(self.dtype)}"

    @property
    def key(self) -> str:
        """See `Kernel.key`."""
        return self.place

    def text(self) -> KernelText:
        """See `Kernel.text`."""
        return KernelText(
            name=name(self.key),
            input_names=("token", "words", "scales", "biases"),
            output_names=("row",),
            source=_SOURCE.strip("\n"),
            header=header(
                ("embedding_row",),
                {
                    "T": self.dtype,
                    "BITS": self.bits,
                    "GROUP_SIZE": self.group_size,
                    "COLUMNS": self.columns,
                },
            ),
        )

    def launch(self, inputs: Sequence[mx.array]) -> Launch:
        """See `Kernel.launch`."""
        return Launch(
            grid=(self.columns, 1, 1),
            threadgroup=(min(256, self.columns), 1, 1),
            output_shapes=((1, 1, self.columns),),
            output_dtypes=(self.dtype,),
        )

    def trial(self, seed: int) -> list[mx.array]:
        """See `Kernel.trial`."""
        place, weights = mx.random.split(mx.random.key(seed))
        table = reference.random_weights(
            TRIAL_ROWS, self.columns, self.bits, self.group_size, self.dtype, weights
        )
        return [mx.random.randint(0, TRIAL_ROWS, (1,), mx.uint32, key=place), *table]

    def plain(self, inputs: Sequence[mx.array]) -> list[mx.array]:
        """See `Kernel.plain`."""
        token, *table = inputs
        words, scales, biases = (part[token.reshape(1, 1)] for part in table)
        return [mx.dequantize(words, scales, biases, self.group_size, self.bits)]

    def exact(self, inputs: Sequence[mx.array]) -> list[Exact]:
        """See `Kernel.exact`."""
        token, *table = inputs
        words, scales, biases = (part[token.reshape(1)] for part in table)
        return [reference.dequantized(words, scales, biases, self.bits, self.columns)[None]]

    @property
    def tolerance(self) -> float:
        """See `Kernel.tolerance`."""
        return UNIT_ROUNDOFF[self.dtype] + 1e-6
