"""What MLX can quantize to: bits, group size and mode, and the sizes that follow from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Mode = Literal["affine", "mxfp4", "mxfp8", "nvfp4"]

AFFINE_BITS = (2, 3, 4, 5, 6, 8)
AFFINE_GROUP_SIZES = (32, 64, 128)
# mode -> (bits, group size): the floating-point formats come in one form each.
FLOAT_MODES: dict[str, tuple[int, int]] = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}


@dataclass(frozen=True, slots=True)
class QuantSpec:
    """One quantized format of a weight matrix `[out, in]`, grouped along `in`.

    Affine weights are `scale * code + bias` per group; the floating-point modes hold one shared
    8-bit scale per group and no bias (OCP Microscaling v1.0; NVFP4).

    Raises:
        ValueError: MLX has no such format.
    """

    bits: int
    group_size: int
    mode: Mode = "affine"

    def __post_init__(self) -> None:
        if self.mode == "affine":
            if self.bits not in AFFINE_BITS:
                raise ValueError(f"{self.bits} bits: affine weights have {_either(AFFINE_BITS)}")
            if self.group_size not in AFFINE_GROUP_SIZES:
                raise ValueError(
                    f"group size {self.group_size}: affine groups have "
                    f"{_either(AFFINE_GROUP_SIZES)} weights"
                )
        elif self.mode not in FLOAT_MODES:
            raise ValueError(f"mode {self.mode!r}: expected affine, {', '.join(FLOAT_MODES)}")
        elif (self.bits, self.group_size) != FLOAT_MODES[self.mode]:
            bits, group_size = FLOAT_MODES[self.mode]
            raise ValueError(f"{self.mode} has {bits} bits and groups of {group_size}")

    @property
    def has_biases(self) -> bool:
        """Whether each group stores a bias beside its scale."""
        return self.mode == "affine"

    def fits(self, columns: int) -> bool:
        """Whether a row of `columns` weights divides into whole groups and whole 32-bit words."""
        return columns % self.group_size == 0 and columns * self.bits % 32 == 0

    def packed_columns(self, columns: int) -> int:
        """Number of 32-bit words that hold a row of `columns` codes."""
        return columns * self.bits // 32

    def groups(self, columns: int) -> int:
        """Number of groups in a row of `columns` weights."""
        return columns // self.group_size

    def weight_bytes(self, rows: int, columns: int, scale_bytes: int) -> int:
        """Bytes of codes, scales and biases of a matrix; `scale_bytes` per affine scale."""
        codes = rows * self.packed_columns(columns) * 4
        per_group = 2 * scale_bytes if self.has_biases else 1
        return codes + rows * self.groups(columns) * per_group

    def bits_per_weight(self, scale_bytes: int) -> float:
        """Bits per weight with scales and biases counted."""
        per_group = 2 * scale_bytes if self.has_biases else 1
        return self.bits + 8 * per_group / self.group_size

    def __str__(self) -> str:
        if self.mode == "affine":
            return f"{self.bits} bits, groups of {self.group_size}"
        return self.mode


def _either(choices: tuple[int, ...]) -> str:
    return ", ".join(map(str, choices[:-1])) + f" or {choices[-1]}"
