"""A model split by layers: what each rank has and reads, and that together they are the model."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np
import pytest

from apertus_mlx.backend.mlx import load_inventory
from apertus_mlx.backend.ranks import Ranks
from apertus_mlx.cache import FULL_PRECISION, CacheConfig
from apertus_mlx.checkpoint.inventory import Inventory, take_inventory
from apertus_mlx.errors import RejectedError, UsageError
from apertus_mlx.generation.decode import prefill
from apertus_mlx.memory.footprint import GPU_16_BIT, footprint, weights_bytes
from apertus_mlx.memory.layers_by_memory import layers_by_memory
from apertus_mlx.model.apertus import Model
from apertus_mlx.model.stages import stage_of
from apertus_mlx.quant.spec import QuantSpec
from apertus_mlx.tools import plan_pipeline
from tests.backend.test_ranks import FORMATS, GEOMETRY, quantized
from tests.builders import config_4x, random_weights, write_checkpoint
from tests.links import Wire
from tests.model.test_split import GEOMETRIES, VOCABULARY, planned

PROMPT = [1, *(74 + 7 * i % 256 for i in range(80))]
FORMS = [CacheConfig(), CacheConfig(bound=48), CacheConfig(8, 8, window=8)]
SPLIT = [range(1), range(1, 4), range(4, 6)]


def stages(whole: Inventory) -> list[Model]:
    carried: list[mx.array] = []
    count = len(SPLIT)
    return [
        load_inventory(
            stage_of(whole, layers, rank, count),
            "float32",
            ranks=cast(Ranks, Wire(rank, count, carried)),
        )
        for rank, layers in enumerate(SPLIT)
    ]


def read(models: list[Model], form: CacheConfig) -> np.ndarray:
    """Logits after a prompt in two chunks, and after two more tokens; of the last model."""
    caches = [model.make_cache(form) for model in models]
    found: dict[int, mx.array] = {}
    for start in (0, 48):
        for model, cache in zip(models, caches, strict=True):
            found[0] = prefill(model, PROMPT[start:][:48], cache)
    kept = [found[0]]
    for token in (90, 100):
        for model, cache in zip(models, caches, strict=True):
            found[0] = model.next_token_logits(mx.array([[token]]), cache).values
        kept.append(found[0])
    return np.array(mx.stack(kept))


@pytest.mark.parametrize("tied", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_stages_one_after_the_other_are_the_model(tmp_path: Path, tied: bool) -> None:
    changes: dict[str, Any] = {"num_hidden_layers": 6, "tie_word_embeddings": tied}
    plain = config_4x(**{**GEOMETRY, **changes})
    folders = [
        write_checkpoint(tmp_path / "floats", plain, shards=3),
        quantized(tmp_path / "codes", FORMATS, **changes),
    ]
    for folder in folders:
        inventory = take_inventory(folder)
        alone, split = load_inventory(inventory, "float32"), stages(inventory)
        for form in FORMS if folder == folders[0] else FORMS[:1]:
            expected = read([alone], form)
            worst = np.abs(read(split, form) - expected).max() / np.abs(expected).max()
            assert worst < 1e-5, (folder.name, str(form))


def test_a_rank_reads_only_its_layers(tmp_path: Path) -> None:
    """The others' numbers would be refused."""
    config = config_4x(num_hidden_layers=6)
    weights = dict(random_weights(config))
    weights["model.layers.2.mlp.up_proj.weight"][:] = np.nan
    inventory = take_inventory(write_checkpoint(tmp_path, config, weights))
    wire = cast(Ranks, Wire(0, 2))
    model = load_inventory(stage_of(inventory, range(2), 0, 2), ranks=wire)
    assert len(model.layers) == 2
    with pytest.raises(RejectedError, match=r"model\.layers\.2\.mlp"):
        load_inventory(stage_of(inventory, range(2, 6), 1, 2), ranks=cast(Ranks, Wire(1, 2)))


@pytest.mark.parametrize("bits", [4, 16])
def test_memory_of_a_stage(bits: int) -> None:
    whole = planned("70B", None if bits == 16 else QuantSpec(bits, 64))
    _, hidden, inner, heads, kv_heads = GEOMETRIES["70B"]
    per_weight = bits / 8 if bits == 16 else (bits + 32 / 64) / 8
    layer = hidden * (2 * hidden + 2 * hidden * kv_heads // heads + 2 * inner) * per_weight
    vectors = 2 * (2 * hidden + 2 * hidden // heads + 4)
    edge = VOCABULARY * hidden * per_weight
    for rank, own in enumerate((range(50), range(50, 80))):
        part = stage_of(whole, own, rank, 2)
        edges = edge * (2 if rank == 0 else 1)  # the embedding is on the first alone
        assert weights_bytes(part, 2) == len(own) * (layer + vectors) + edges + 2 * hidden


@pytest.mark.parametrize(
    "limits",
    [(6, 12, 6), *(pytest.param(x, marks=pytest.mark.nightly) for x in [(8, 8, 8), (16, 3, 5)])],
)
def test_the_fullest_rank_is_as_little_full_as_can_be(limits: tuple[int, ...]) -> None:
    """Against all splits there are."""
    whole = planned("8B", QuantSpec(4, 64))
    given = [limit * 10**9 for limit in limits]

    def fullest(split: list[range]) -> float:
        parts = [stage_of(whole, layers, rank, 3) for rank, layers in enumerate(split)]
        taken = [footprint(part, FULL_PRECISION, 8192, 512, GPU_16_BIT) for part in parts]
        return max(each.total_bytes / limit for each, limit in zip(taken, given, strict=True))

    found = layers_by_memory(whole, given, GPU_16_BIT)
    assert [layer for layers in found for layer in layers] == list(range(32))
    ends = combinations(range(1, 32), 2)
    least = min(fullest([range(a), range(a, b), range(b, 32)]) for a, b in ends)
    assert fullest(found) <= least * (1 + 1e-9)


def test_more_ranks_than_layers_are_refused() -> None:
    with pytest.raises(UsageError, match="33 ranks: there are but 32 layers"):
        layers_by_memory(planned("8B", None), [10**10] * 33, GPU_16_BIT)


def test_the_plan_of_stages(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, config_4x(num_hidden_layers=6))
    split = plan_pipeline(folder, device="8GB,M3 Max", kv_bits=16)
    assert [stage.device for stage in split.stages] == ["8GB", "m3-max-36gb"]
    assert sum(stage.layers for stage in split.stages) == split.layers == 6
    assert split.fits
    assert split.advice == "fits: mlx.launch ... --pipeline --prefill-step 512"
    alike = plan_pipeline(folder, device="8GB", ranks=2)
    assert [stage.layers for stage in alike.stages] == [3, 3]
    assert not plan_pipeline(folder, device="1MB", ranks=2).fits
    for wrong in ({"device": "8GB"}, {"device": "8GB,8GB", "ranks": 3}):
        with pytest.raises(UsageError, match="--pipeline: "):
            plan_pipeline(folder, **wrong)  # type: ignore[arg-type]
