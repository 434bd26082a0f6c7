"""The products that are timed are those of the model's shapes and formats."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest

from apertus_mlx.checkpoint.inventory import take_inventory
from apertus_mlx.measure.doctor import row_costs as timed
from apertus_mlx.quant.spec import QuantSpec
from tests.builders import config_4x, write_checkpoint


@pytest.mark.parametrize(
    "spec", [None, QuantSpec(2, 64), QuantSpec(8, 32), QuantSpec(4, 32, "mxfp4")], ids=str
)
def test_a_product_reads_the_whole_matrix(spec: QuantSpec | None) -> None:
    vectors = mx.random.normal((3, 128))
    found = timed._product(200, 128, spec, mx.float32)(vectors)
    assert found.shape == (3, 200)
    # Its rows are 64 over and over.
    assert mx.array_equal(found[:, :64], found[:, 64:128])
    assert not mx.array_equal(found[:, 0], found[:, 1])


def test_one_row_costs_what_one_row_costs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds that grow with the rows, and a slow first go, which does not count."""
    inventory = take_inventory(write_checkpoint(tmp_path, config_4x()))
    asked: list[int] = []

    def seconds(given: list[tuple[mx.array, timed.Product]]) -> float:
        rows = {vectors.shape[0] for vectors, _ in given}
        asked.append(len(given))
        return 100.0 if len(asked) <= 2 * timed.MOST_ROWS else 2.0 + rows.pop()

    monkeypatch.setattr(timed, "_seconds", seconds)
    found = timed.row_costs(inventory, mx.float32)
    assert found == (1, 4 / 3, 5 / 3, 2, 7 / 3)
    # Queries, keys, values, what follows attention, and both of the feed-forward.
    assert set(asked) == {6}
