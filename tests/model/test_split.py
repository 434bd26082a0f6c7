"""What each rank holds at the released geometries, reckoned by hand; what does not divide."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path

import pytest

from apertus_mlx.cache import FULL_PRECISION
from apertus_mlx.checkpoint.config import parse_config
from apertus_mlx.checkpoint.inventory import Inventory
from apertus_mlx.errors import UsageError
from apertus_mlx.memory.footprint import GPU_16_BIT, kv_bytes, weights_bytes
from apertus_mlx.model.split import part_of
from apertus_mlx.quant.spec import QuantSpec
from apertus_mlx.tools import plan
from tests.builders import config_4x, planned_inventory, write_checkpoint
from tests.daily import every

# layers, hidden, MLP, heads, key heads, as the released models' configs say.
GEOMETRIES = {"8B": (32, 4096, 21504, 32, 8), "70B": (80, 8192, 43008, 64, 8)}
VOCABULARY = 131_072


def planned(size: str, spec: QuantSpec | None, tied: bool = False) -> Inventory:
    layers, hidden, inner, heads, kv_heads = GEOMETRIES[size]
    values = config_4x(
        num_hidden_layers=layers, hidden_size=hidden, intermediate_size=inner,
        num_attention_heads=heads, num_key_value_heads=kv_heads, vocab_size=VOCABULARY,
        max_position_embeddings=65_536, tie_word_embeddings=tied,
    )  # fmt: skip
    return planned_inventory(size, parse_config(values), spec)


CASES = product(GEOMETRIES, (2, 3, 4, 6, 8, 16), (2, 4, 8), (False, True))


@pytest.mark.parametrize("case", every(11, CASES))
def test_memory_of_a_rank(case: tuple[str, int, int, bool]) -> None:
    size, bits, ranks, tied = case
    spec = None if bits == 16 else QuantSpec(bits, 64)
    part = part_of(planned(size, spec, tied), ranks)
    layers, hidden, inner, heads, kv_heads = GEOMETRIES[size]
    split = layers * hidden * (2 * hidden + 2 * hidden * kv_heads // heads + 2 * inner)
    split += (1 if tied else 2) * VOCABULARY * hidden
    # Two norms and those of a head for each layer, four slopes, the last norm; in 16 bits.
    vectors = layers * (2 * hidden + 2 * hidden // heads + 4) + hidden
    per_weight = bits / 8 if bits == 16 else (bits + 32 / 64) / 8
    assert weights_bytes(part, 2) == split / ranks * per_weight + 2 * vectors
    context = 4096
    cache = 2 * 2 * layers * context * kv_heads // ranks * (hidden // heads)
    assert kv_bytes(part.config, FULL_PRECISION, context, GPU_16_BIT.compute_bytes) == cache


@pytest.mark.parametrize(
    ("ranks", "spec", "changes", "reason"),
    [
        (3, None, {}, "4 attention heads do not divide by 3; 2 would do"),
        (4, None, {}, "2 key/value heads do not divide by 4; 2 would do"),
        (2, None, {"intermediate_size": 129}, "129 inner numbers of the feed-forward do not"),
        (2, QuantSpec(4, 64), {}, "o_proj: 32 columns would cut a group (4 bits, groups of 64)"),
    ],
)
def test_what_does_not_divide_is_refused(
    ranks: int, spec: QuantSpec | None, changes: dict[str, int], reason: str
) -> None:
    config = parse_config(config_4x(**changes))
    with pytest.raises(UsageError, match=re.escape(reason)):
        part_of(planned_inventory("tiny", config, spec), ranks)


def test_the_plan_of_a_rank(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, config_4x())
    alone, split = plan(folder, device="8GB"), plan(folder, device="8GB", ranks=2)
    assert (alone.ranks, split.ranks) == (1, 2)
    assert split.parameters == alone.parameters
    one, two = alone.forms[0], split.forms[0]
    assert two.kv_bytes == one.kv_bytes / 2
    # Half of two layers of q, k, v, o, up and down, and of embedding and head, all in float32 as
    # they are stored.
    layer = 64 * (64 + 32 + 32 + 64 + 128 + 128)
    assert one.weights_bytes - two.weights_bytes == 4 * (2 * layer + 2 * 384 * 64) / 2


@pytest.mark.parametrize(
    ("ids", "outputs", "whole"),
    [(384, 384, []), (385, 385, ["model.embed_tokens", "lm_head"]), (386, 385, ["lm_head"])],
)
def test_token_ids_that_do_not_divide_are_whole_on_every_rank(
    ids: int, outputs: int, whole: list[str]
) -> None:
    config = parse_config(config_4x(vocab_size=ids, output_vocab_size=outputs))
    inventory = planned_inventory("tiny", config, None)
    part = part_of(inventory, 2)
    for path in ("model.embed_tokens", "lm_head"):
        count = inventory.matrices[path].rows
        assert part.matrices[path].rows == (count if path in whole else count / 2)
