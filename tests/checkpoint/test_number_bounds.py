"""Numbers of a checkpoint with which float32 cannot compute: refused when read, by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from apertus_mlx.checkpoint.config import parse_config
from apertus_mlx.checkpoint.generation_config import read_generation_config
from apertus_mlx.checkpoint.inventory import take_inventory
from apertus_mlx.convert.evaluation.layerwise import open_weights
from apertus_mlx.convert.job import prepare
from apertus_mlx.convert.plan.policy import Request
from apertus_mlx.convert.sources.reading import Reader
from apertus_mlx.errors import RejectedError
from apertus_mlx.quant.spec import QuantSpec
from tests import convert_builders as build
from tests.builders import LLAMA3, config_4x, random_weights, write_checkpoint

ACTIVATION = "model.layers.0.mlp.act_fn."


@pytest.mark.parametrize(
    ("constant", "value"),
    [
        ("alpha_p", 1e30), ("alpha_n", 1e30), ("beta", -1e30), ("beta", 1e7), ("eps", -1e3),
        ("alpha_p", np.nan), ("alpha_n", -np.inf), ("alpha_p", -1e30),
    ],
)  # fmt: skip
def test_constants_of_xielu(tmp_path: Path, constant: str, value: float) -> None:
    weights = random_weights(config_4x())
    weights[ACTIVATION + constant] = np.full_like(weights[ACTIVATION + constant], value)
    folder = write_checkpoint(tmp_path, config_4x(), weights)
    with pytest.raises(RejectedError, match=f"{ACTIVATION}{constant}: .* beyond"):
        take_inventory(folder)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_constants_of_xielu_in_what_is_converted(tmp_path: Path, dtype: str) -> None:
    tensors = build.random_tensors(build.config(), dtype)
    sound = build.write_checkpoint(tmp_path / "sound", tensors=tensors)
    prepare(sound, Request(QuantSpec(4, 64)), "x")
    name = ACTIVATION + "alpha_p"
    # A float16 holds no larger one.
    value = 1e30 if dtype != "F16" else np.inf
    tensors[name] = build.raw(np.full(1, value), dtype)
    folder = build.write_checkpoint(tmp_path / "in", tensors=tensors)
    with pytest.raises(RejectedError, match=f"{name}: .* beyond"):
        prepare(folder, Request(QuantSpec(4, 64)), "x")
    with Reader(folder) as reader, pytest.raises(RejectedError, match=f"{name}: .* beyond"):
        open_weights(folder, reader)


def test_the_largest_slopes_of_trained_models_pass(tmp_path: Path) -> None:
    weights = random_weights(config_4x())
    for constant in ("alpha_p", "alpha_n"):
        weights[ACTIVATION + constant] = np.full(1, 1000, np.float32)
    take_inventory(write_checkpoint(tmp_path, config_4x(), weights))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rope_theta": 1e-300}, "rope_theta"),
        ({"rope_theta": 1.0}, "rope_theta"),
        ({"rope_theta": 10**400}, "rope_theta"),
        ({"rms_norm_eps": 1e-300}, "rms_norm_eps"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps"),
        ({"rope_scaling": {"type": "linear", "factor": 1e-300}}, "factor"),
        ({"rope_scaling": {**LLAMA3, "factor": 1e-300}}, "factor"),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": 1e-300}}, "low_freq_factor"),
    ],
)
def test_numbers_of_the_config(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(RejectedError, match=f"{named}: expected a number above"):
        parse_config(config_4x(**changes))


@pytest.mark.parametrize("value", [10**400, -(10**400)], ids=["large", "small"])
def test_numbers_of_the_generation_config_that_no_float_holds(tmp_path: Path, value: int) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"temperature": value}))
    with pytest.raises(RejectedError, match="temperature: expected a number above"):
        read_generation_config(tmp_path, 384)
