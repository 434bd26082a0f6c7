"""Models split over ranks compute what one process computes, and hold what was planned."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from apertus_mlx.checkpoint.inventory import take_inventory
from apertus_mlx.memory.footprint import weights_bytes
from apertus_mlx.model.split import part_of
from apertus_mlx.model.stages import stage_of
from tests.backend import rank_cases
from tests.builders import config_4x, random_weights, write_checkpoint
from tests.ranks import ends, start

GEOMETRY: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
FACTORED = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "lm_head")


WIDTHS = [{"group_size": 32, "bits": bits} for bits in (2, 3, 4, 6, 8)]
FORMATS = [*WIDTHS, {"group_size": 32, "bits": 8, "mode": "mxfp8"}]
FORMATS.insert(1, {"group_size": 32, "bits": 4, "mode": "mxfp4"})


def quantized(folder: Path, formats: list[dict[str, Any]], **changes: Any) -> Path:
    """A model with its matrices in formats of MLX, in turn, as MLX itself quantizes.

    Where a format has no biases, the product also has factors: for each row, or one for all.
    """
    config = config_4x(**{**GEOMETRY, **changes})
    weights = dict(random_weights(config))
    matrices = [name for name, array in weights.items() if array.ndim == 2]
    block: dict[str, Any] = dict(formats[0])
    for index, name in enumerate(matrices):
        spec, array = formats[index % len(formats)], weights[name]
        path = name.removesuffix(".weight")
        block[path] = spec
        parts = mx.quantize(mx.array(array), **spec)
        for kind, part in zip(("weight", "scales", "biases"), parts, strict=False):
            weights[f"{path}.{kind}"] = part
        if len(parts) == 2 and path.endswith(FACTORED):
            rows = 1 if path.endswith("up_proj") else array.shape[0]
            weights[f"{path}.output_scale"] = np.linspace(0.5, 1.5, rows, dtype=np.float32)
    return write_checkpoint(folder, {**config, "quantization": block}, weights)


def models(folder: Path, **changes: Any) -> list[Path]:
    """In 16 bits; in one format, whose projections are joined; in all formats, tied and untied."""
    tied = {**changes, "tie_word_embeddings": True}
    plain = config_4x(**{**GEOMETRY, **changes})
    return [
        write_checkpoint(folder / "bfloat16", plain, dtype=mx.bfloat16, shards=3),
        quantized(folder / "4 bits", WIDTHS[2:3], **changes),
        quantized(folder / "mixed, tied", FORMATS, **tied),
    ]


def all_models(folder: Path, **changes: Any) -> list[Path]:
    tied = config_4x(**{**GEOMETRY, **changes, "tie_word_embeddings": True})
    found = [write_checkpoint(folder / "float16, tied", tied, dtype=mx.float16)]
    # No number of ranks divides them, of one model those of the head alone.
    found.append(quantized(folder / "odd", WIDTHS[2:3], **changes, vocab_size=385))
    cut = {"vocab_size": 384, "output_vocab_size": 383}
    found.append(quantized(folder / "odd head", WIDTHS[2:3], **changes, **cut))
    for number, spec in enumerate(FORMATS):
        found.append(quantized(folder / f"format {number}", [spec], **changes))
    return models(folder, **changes) + found


def compare(
    folder: Path,
    given: list[Path],
    ranks: int,
    limits: str = "",
    split: Sequence[range] = (),
    briefly: bool = False,
) -> None:
    """Each rank against this process, which computes alone; by layers if memory has `limits`."""
    command = ["-m", "tests.backend.rank_cases", limits, "briefly" if briefly else "all"]
    command += [str(folder), *map(str, given)]
    for code, _, err in ends(start(folder, [command] * ranks)):
        assert code == 0, err
    alone = rank_cases.results(given, briefly)
    for rank in range(ranks):
        found = dict(np.load(folder / f"rank{rank}.npz"))
        assert set(found) == set(alone)
        for name, expected in alone.items():
            model, what = name.split("; ")
            if what in rank_cases.FORMS:
                worst = np.abs(found[name] - expected).max() / np.abs(expected).max()
                assert worst < rank_cases.FORMS[what][1], (name, rank, worst)
            elif what == "bytes":
                # The planner says it from headers alone.
                whole = take_inventory(folder / model)
                part = stage_of(whole, split[rank], rank, ranks) if split else part_of(whole, ranks)
                factors = sum(4 * math.prod(factor.shape) for factor in part.factors.values())
                assert found[name] == weights_bytes(part, 4) + factors < expected, (name, rank)
            else:
                assert found[name].tolist() == expected.tolist(), (name, rank)
        told = json.loads((folder / f"rank{rank}.json").read_text())
        tokens, reason = told["stopped"]
        greedy = alone["bfloat16; greedy"].tolist()
        assert tokens == greedy[: len(tokens)]
        # One token may be on its way when a rank wants to stop, and its word goes with the next.
        assert 4 <= len(tokens) <= 7
        assert reason == "cancelled"
        last = f"rank {ranks - 1} (127.0.0.1)"
        assert told["refused"] == f"{last} has another config.json than rank 0 (127.0.0.1)"


def test_two_ranks_compute_what_one_process_does(tmp_path: Path) -> None:
    compare(tmp_path, models(tmp_path), 2, briefly=True)


@pytest.mark.nightly
def test_two_ranks_compute_it_with_every_cache(tmp_path: Path) -> None:
    compare(tmp_path, models(tmp_path), 2)


LAYERS = {"num_hidden_layers": 6}


@pytest.mark.nightly
def test_layers_on_two_ranks_compute_what_one_process_does(tmp_path: Path) -> None:
    split = [range(1), range(1, 6)]
    compare(tmp_path, all_models(tmp_path, **LAYERS), 2, "20MB,40MB", split)


@pytest.mark.nightly
def test_layers_on_four_ranks_compute_what_one_process_does(tmp_path: Path) -> None:
    split = [range(each, each + 1) for each in range(4)]
    four = {"num_hidden_layers": 4}
    compare(tmp_path, models(tmp_path, **four), 4, "20MB,20MB,20MB,20MB", split)


WIDE = {"num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 256}


@pytest.mark.nightly
def test_two_ranks_compute_every_format(tmp_path: Path) -> None:
    compare(tmp_path, all_models(tmp_path, **WIDE), 2)


@pytest.mark.nightly
def test_four_ranks_compute_what_one_process_does(tmp_path: Path) -> None:
    compare(tmp_path, models(tmp_path, **WIDE), 4)
