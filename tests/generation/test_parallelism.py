"""How many rows decode at a time: by the table of what MLX's kernels do."""

import pytest

from apertus_mlx.generation.parallelism import default_rows
from apertus_mlx.quant.spec import QuantSpec

AFFINE, FLOAT = QuantSpec(4, 64), QuantSpec(4, 32, "mxfp4")


@pytest.mark.parametrize(
    ("chip", "formats", "rows"),
    [
        ("Apple M1", [AFFINE], 2),
        ("Apple M2 Ultra", [FLOAT, AFFINE], 2),
        ("Apple M2 Max", [FLOAT], 4),
        ("Apple M1 Pro", [], 4),
        ("Apple M3", [AFFINE], 4),
        ("Apple M10", [AFFINE], 4),
        ("some other machine", [AFFINE], 4),
    ],
)
def test_rows_by_chip_and_format(chip: str, formats: list[QuantSpec], rows: int) -> None:
    assert default_rows(formats, chip) == rows
