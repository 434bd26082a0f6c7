"""A quantized matrix while it is fitted: columns are rows here. NumPy or MLX."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from apertus_mlx.quant.affine import AffineCodes
from apertus_mlx.quant.arrays import Array, library
from apertus_mlx.quant.spec import QuantSpec


@dataclass(frozen=True, slots=True)
class Columns:
    """Codes `[columns, rows]` as float32, scales and biases `[groups, rows]`."""

    codes: Array
    scales: Array
    biases: Array
    spec: QuantSpec

    def values(self) -> Array:
        """The weights `[columns, rows]` that the codes stand for."""
        grouped = self.codes.reshape(len(self.scales), self.spec.group_size, -1)
        values = grouped * self.scales[:, None] + self.biases[:, None]
        return values.reshape(self.codes.shape)

    def with_codes(self, codes: Array) -> Columns:
        """Other codes with the same scales and biases."""
        return replace(self, codes=codes)

    def where(self, mask: Array, other: Columns) -> Columns:
        """These for the rows in `mask` `[rows]`, `other` for the rest."""
        where = library(mask).where
        return Columns(
            where(mask, self.codes, other.codes),
            where(mask, self.scales, other.scales),
            where(mask, self.biases, other.biases),
            self.spec,
        )

    def as_codes(self) -> AffineCodes:
        """The same by rows, of NumPy."""
        codes, scales, biases = (
            np.ascontiguousarray(np.array(array, copy=None).T)
            for array in (self.codes, self.scales, self.biases)
        )
        return AffineCodes(codes.astype(np.uint8), scales, biases, self.spec)
