"""Quantized matrix times one vector, with what comes before and after it in the same kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import mlx.core as mx
import numpy as np

from apertus_mlx.backend.metal import reference
from apertus_mlx.backend.metal.kernel import Exact, Kernel, KernelText, Launch
from apertus_mlx.backend.metal.text import UNIT_ROUNDOFF, specialised, type_key
from apertus_mlx.model.apertus import xielu
from apertus_mlx.quant.spec import QuantSpec

Prologue = Literal["none", "rms_norm"]
Epilogue = Literal["none", "xielu", "residual", "peaks"]
# Simdgroups in a threadgroup, and rows that each of them computes.
Tile = tuple[int, int]

DEFAULT_TILE: Tile = (2, 4)
TILES: tuple[Tile, ...] = (DEFAULT_TILE, (2, 8), (4, 4), (4, 8), (2, 2), (4, 2))
SLOPE_COUNT = 8
# Slopes of the hardest layer of a trained model, the first of Apertus 8B.
HARD_SLOPES = (166.0, 41.25, 0.5, -1e-6)

_SETUP = """
  const uint lane = thread_index_in_simdgroup;
  const uint simdgroup = simdgroup_index_in_threadgroup;
  const uint tile_index = threadgroup_position_in_grid.y;
  const int first = (int(tile_index) * apertus::SIMDGROUPS + int(simdgroup)) * apertus::ROWS_EACH;
"""
# `peaks` has a barrier, which no simdgroup may miss.
_LEAVE = """
  if (first >= apertus::ROWS) {
    return;
  }
"""
_VECTOR: dict[Prologue, str] = {
    "none": "  apertus::PlainVector operand = {x};",
    "rms_norm": "  apertus::NormedVector operand = {x, norm, 0.0f};",
}
_MULTIPLY = """
  float result[apertus::ROWS_EACH];
  apertus::multiply_rows(operand, words, scales, biases, first, lane, result);
"""
_STORE: dict[Epilogue, str] = {
    "none": "  apertus::store(result, first, lane, y);",
    "xielu": "  apertus::store_xielu(result, first, lane, slopes, y);",
    "residual": "  apertus::store_residual(result, first, lane, residual, y);",
    "peaks": """
  threadgroup float bests[apertus::SIMDGROUPS];
  threadgroup uint tokens[apertus::SIMDGROUPS];
  apertus::store_peaks(
      result, first, lane, simdgroup, tile_index, bests, tokens, y, peaks, peak_tokens);
""",
}


@dataclass(frozen=True, slots=True)
class QuantizedMatvec(Kernel):
    """`epilogue(W prologue(x))` for an affine `W` `[rows, columns]`, of one position.

    Inputs: x `[1, 1, columns]`; words, scales and biases of W; with `rms_norm` its weight
    `[columns]`; with `xielu` the float32 slopes alpha_p, alpha_n, beta, eps and four zeros; with
    `residual` that, `[1, 1, rows]`.

    Outputs: y `[1, 1, rows]`; with `peaks` also the largest logit (float32) and its token (uint32)
    of each tile, `[tiles]`: as rounded to `dtype`, the lowest token of equals, NaN below all.

    Everything is float32 until the one rounding of y.
    """

    bits: int
    group_size: int
    columns: int
    rows: int
    dtype: mx.Dtype
    prologue: Prologue = "none"
    epilogue: Epilogue = "none"
    eps: float = 1e-5
    tile: Tile = DEFAULT_TILE

    def __post_init__(self) -> None:
        problem = unfit(QuantSpec(self.bits, self.group_size), self.rows, self.columns)
        if problem:
            raise ValueError(problem)

    @property
    def place(self) -> str:
        prologue = f"rms_norm{self.eps!r}-" if self.prologue == "rms_norm" else ""
        epilogue = "" if self.epilogue == "none" else f"-{self.epilogue}"
        shape = f"{self.rows}x{self.columns}-{self.bits}bit-g{self.group_size}"
        return f"{prologue}matvec{epilogue}-{shape}-{type_key(self.dtype)}"

    @property
    def key(self) -> str:
        return f"{self.place}-tile{self.simdgroups}x{self.rows_each}"

    @property
    def simdgroups(self) -> int:
        """Simdgroups of a threadgroup."""
        return self.tile[0]

    @property
    def rows_each(self) -> int:
        """Rows that a simdgroup computes."""
        return self.tile[1]

    @property
    def tile_rows(self) -> int:
        """Rows that a threadgroup computes."""
        return self.tile[0] * self.tile[1]

    @property
    def tiles(self) -> int:
        """Threadgroups."""
        return -(-self.rows // self.tile_rows)

    def text(self) -> KernelText:
        normed, peaks = self.prologue == "rms_norm", self.epilogue == "peaks"
        inputs = ["x", "words", "scales", "biases"]
        inputs += ["norm"] if normed else []
        inputs += {"xielu": ["slopes"], "residual": ["residual"]}.get(self.epilogue, [])
        outputs = ["y", "peaks", "peak_tokens"] if peaks else ["y"]
        leave = "" if peaks else _LEAVE
        body = (_SETUP, leave, _VECTOR[self.prologue], _MULTIPLY, _STORE[self.epilogue])
        source = "\n".join(part.strip("\n") for part in body if part)
        vector = "normed_vector" if normed else "plain_vector"
        store = "store" if self.epilogue == "none" else f"store_{self.epilogue}"
        constants = "T BITS GROUP_SIZE COLUMNS ROWS SIMDGROUPS ROWS_EACH" + " EPS" * normed
        files = (vector, "quantized_matvec", store)
        return specialised(self, inputs, outputs, source, files, constants)

    def launch(self, inputs: Sequence[mx.array]) -> Launch:  # noqa: ARG002 - all have one shape
        shapes: tuple[tuple[int, ...], ...] = ((1, 1, self.rows),)
        dtypes: tuple[mx.Dtype, ...] = (self.dtype,)
        if self.epilogue == "peaks":
            shapes += ((self.tiles,), (self.tiles,))
            dtypes += (mx.float32, mx.uint32)
        grid = (32, self.simdgroups * self.tiles, 1)
        return Launch(grid, (32, self.simdgroups, 1), shapes, dtypes)

    def trial(self, seed: int) -> list[mx.array]:
        keys = mx.random.split(mx.random.key(seed), 4)
        inputs = [mx.random.normal((1, 1, self.columns), self.dtype, key=keys[0])]
        inputs += reference.random_weights(
            self.rows, self.columns, self.bits, self.group_size, self.dtype, keys[1]
        )
        if self.prologue == "rms_norm":
            weight = 1 + 0.1 * mx.random.normal((self.columns,), key=keys[2])
            inputs.append(weight.astype(self.dtype))
        if self.epilogue == "xielu":
            inputs.append(mx.array(HARD_SLOPES + (0.0,) * (SLOPE_COUNT - len(HARD_SLOPES))))
        elif self.epilogue == "residual":
            inputs.append(mx.random.normal((1, 1, self.rows), self.dtype, key=keys[3]))
        return inputs

    def plain(self, inputs: Sequence[mx.array]) -> list[mx.array]:
        x, words, scales, biases, *extra = inputs
        if self.prologue == "rms_norm":
            x = mx.fast.rms_norm(x, extra[0], self.eps)
        y = mx.quantized_matmul(x, words, scales, biases, True, self.group_size, self.bits)
        if self.epilogue == "xielu":
            alpha_p, alpha_n, beta, eps, *_ = extra[-1]
            return [xielu(y, alpha_p, alpha_n, beta, eps)]
        if self.epilogue == "residual":
            return [extra[-1] + y]
        if self.epilogue == "none":
            return [y]
        rows = self.tile_rows
        flat = y.reshape(-1).astype(mx.float32)
        flat = mx.pad(flat, (0, self.tiles * rows - self.rows), constant_values=-float("inf"))
        flat = flat.reshape(self.tiles, rows)
        first = mx.arange(0, self.tiles * rows, rows, mx.uint32)
        return [y, flat.max(axis=1), first + mx.argmax(flat, axis=1)]

    def exact(self, inputs: Sequence[mx.array]) -> list[Exact]:
        x, words, scales, biases, *extra = inputs
        vector = reference.float64(x).reshape(-1)
        if self.prologue == "rms_norm":
            vector = reference.rms_norm(vector, extra[0], self.eps)
        y = reference.product(words, scales, biases, self.bits, vector)
        if self.epilogue == "xielu":
            y = reference.xielu(y, *reference.float64(extra[-1])[:4])
        elif self.epilogue == "residual":
            y = reference.float64(extra[-1]).reshape(-1) + y
        outputs = [y.reshape(1, 1, -1)]
        if self.epilogue == "peaks":
            # The function itself is defined on rounded logits: near ones are equal.
            rounded = reference.float64(mx.array(y, mx.float32).astype(self.dtype))
            step = self.tile_rows
            best = [i + int(np.argmax(rounded[i : i + step])) for i in range(0, self.rows, step)]
            outputs += [y[best], np.array(best, np.float64)]
        return outputs

    @property
    def tolerance(self) -> float:
        return UNIT_ROUNDOFF[self.dtype] + 4e-6


def unfit(spec: QuantSpec, rows: int, columns: int) -> str | None:
    """Why there is no kernel for this matrix; None if there is one."""
    if spec.mode != "affine":
        return f"{spec.mode}: the kernels read affine weights only"
    if columns % 32 or not spec.fits(columns):
        return f"{columns} columns do not divide into chunks of 32 and groups of {spec.group_size}"
    # MLX hands arrays of fewer than 8 elements over in another address space.
    if rows < 8:
        return f"{rows} rows: the kernels want 8 at least"
    if rows * spec.packed_columns(columns) >= 2**31:
        return f"{rows} x {columns} weights are more than 32-bit indices reach"
    return None
