"""Each rank knows the best of its own tokens; the choice is that of one vector of all logits."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import cast

import mlx.core as mx
import numpy as np
import pytest

from apertus_mlx.backend.mlx import load_inventory
from apertus_mlx.backend.ranks import Ranks
from apertus_mlx.checkpoint.inventory import take_inventory
from apertus_mlx.model.language_model import NextTokenLogits
from apertus_mlx.model.split import part_of
from tests.builders import config_4x, random_weights, write_checkpoint
from tests.daily import every
from tests.links import Table

VOCABULARY = 384


@pytest.mark.parametrize("best", every(3, [[191, 192], [5], [380, 200], [300, 5, 100], []]))
def test_of_equal_logits_the_first_is_chosen(tmp_path: Path, best: list[int]) -> None:
    """`best`: ids with the same row in the head, where all others have zeros."""
    config = config_4x()
    weights = dict(random_weights(config))
    head = np.zeros_like(weights["lm_head.weight"])
    weights["lm_head.weight"] = head
    row = np.random.default_rng(1).standard_normal(head.shape[1]).astype(np.float32)
    for sign in (1, -1):
        head[best] = sign * row
        folder = write_checkpoint(tmp_path / str(sign), config, weights)
        for found in next_tokens(folder):
            assert found.best is not None
            assert found.best.item() == np.argmax(np.array(found.values))
            assert found.values.shape == (VOCABULARY,)


def next_tokens(folder: Path) -> list[NextTokenLogits]:
    """What each of two ranks finds."""
    table, whole = Table(2), take_inventory(folder)

    def compute(rank: int) -> NextTokenLogits:
        links = cast(Ranks, table.rank(rank))
        model = load_inventory(part_of(whole, 2, rank), "float32", ranks=links)
        found = model.next_token_logits(mx.array([[80]]))
        mx.eval(found.values, found.best)
        return found

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(compute, range(2)))
