"""How many sequences are worth a common decode step, by chip and format.

MLX's kernels for quantized matrices read the weights once for 2 to 4 vectors, for affine formats
from M3 on; before, each vector reads them again (ml-explore/mlx#3764). Beyond 4 rows a step takes
longer in proportion until some 16 (ml-explore/mlx#3863).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from apertus_mlx.backend import hardware
from apertus_mlx.quant.spec import QuantSpec

ROWS = 4
# Fewer where each row reads the weights again: only what a step costs besides is shared then.
ROWS_THAT_READ_AGAIN = 2
CHIPS_THAT_READ_AGAIN = re.compile(r"Apple M[12]\b")


def default_rows(formats: Iterable[QuantSpec], chip: str | None = None) -> int:
    """How many rows decode at a time, unless someone says otherwise.

    Args:
        formats: of the matrices that are quantized.
        chip: what macOS calls the chip; default: this machine's.
    """
    old = CHIPS_THAT_READ_AGAIN.match(chip or hardware.chip_name() or "")
    affine = any(spec.mode == "affine" for spec in formats)
    return ROWS_THAT_READ_AGAIN if old and affine else ROWS
