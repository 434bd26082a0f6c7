"""Quantizers on a model that has learnt something: the divergence they cause, and its order."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from apertus_mlx.checkpoint import layout
from apertus_mlx.convert.calibration.calibrate import quantize_model
from apertus_mlx.convert.evaluation.layerwise import SourceWeights, open_weights
from apertus_mlx.convert.job import convert, prepare
from apertus_mlx.convert.plan.policy import Request
from apertus_mlx.convert.sources.reading import Reader
from apertus_mlx.quant import search
from apertus_mlx.quant.affine import dequantize
from apertus_mlx.quant.spec import QuantSpec
from benchmarks import quantizers
from benchmarks.quantizer_methods import (
    JUDGE_SEED,
    JUDGE_TOKENS,
    Replaced,
    judge,
    logits,
    measure,
    stock,
    stock_rtn,
)
from tests.trained_model import LENGTH, recipe_windows, session_model, train

CALIBRATION_SEED, HELD_OUT_SEED = 1234, 4321


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return session_model(tmp_path_factory)


@pytest.fixture
def weights(model: Path) -> Iterator[SourceWeights]:
    with Reader(model) as reader:
        yield open_weights(model, reader)


@pytest.mark.nightly
def test_the_model_has_learnt(weights: SourceWeights) -> None:
    """Far below what knowing nothing costs, on documents that it has not seen."""
    windows = recipe_windows(HELD_OUT_SEED, 16, LENGTH)
    scores = logits(weights, windows).astype(np.float64).reshape(*windows.shape, -1)
    scores -= scores.max(-1, keepdims=True)
    scores -= np.log(np.exp(scores).sum(-1, keepdims=True))
    following = np.take_along_axis(scores[:, :-1], windows[:, 1:, None], -1)
    assert -following.mean() < 0.3 * np.log(weights.config.vocab_size)


def test_training_is_repeatable() -> None:
    first, second = train(2), train(2)
    assert first.keys() == second.keys()
    assert all(bool(mx.array_equal(first[name], second[name])) for name in first)


@pytest.mark.nightly
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_each_method_does_less_damage_than_the_one_before(
    model: Path, weights: SourceWeights, bits: int
) -> None:
    """Rounding as mlx-lm does it, the best scales, and calibrated; on held-out text."""
    pytest.importorskip("mlx_lm")
    spec = QuantSpec(bits, 64)
    paths = [matrix.path for matrix in layout.matrices(weights.config)]
    made = {
        "rtn": stock(model, lambda model: stock_rtn(model, spec), spec),
        "search": {p: dequantize(search.fit(weights.matrix(p), spec)) for p in paths},
        "gptq": {
            path: dequantize(codes)
            for path, codes in quantize_model(
                weights, dict.fromkeys(paths, spec), recipe_windows(CALIBRATION_SEED, 32, LENGTH)
            )
        },
    }
    held_out = recipe_windows(HELD_OUT_SEED, 32, LENGTH)
    divergences = [
        judge(weights, Replaced(weights, matrices, {}), held_out).kl_mean
        for matrices in made.values()
    ]
    assert made["rtn"].keys() == made["search"].keys() == made["gptq"].keys()
    assert divergences == sorted(divergences, reverse=True)


@pytest.mark.nightly
def test_a_row_of_the_benchmark(model: Path, tmp_path: Path) -> None:
    """What `search` is said to do is what a converted folder does, byte for byte."""
    case = quantizers.Case("search", model, bits=3, length=LENGTH, windows=1)
    row = measure(case)
    request = Request(QuantSpec(3, 64), method="search")
    folder = convert(prepare(model, request, "source"), tmp_path / "model")
    arrays = mx.load(str(folder / "model.safetensors"))
    assert isinstance(arrays, dict)
    assert row["bytes"] == sum(array.nbytes for array in arrays.values())
    windows = recipe_windows(JUDGE_SEED, JUDGE_TOKENS // LENGTH, LENGTH)
    with Reader(model) as original, Reader(folder) as converted:
        found = judge(open_weights(model, original), open_weights(folder, converted), windows)
    assert row["kl_mean"] == pytest.approx(found.kl_mean, rel=1e-4)
    assert row["top1_agreement"] == pytest.approx(found.top1_agreement, abs=1e-3)


def test_verdicts_compare_the_best_of_each_side() -> None:
    divergences = {"mlx-lm rtn": 0.3, "mlx-lm dwq": 0.2, "search": 0.15, "gptq": 0.05}
    found = [
        {"model": "m", "bits": 2, "method": method, "kl_mean": divergence}
        for method, divergence in divergences.items()
    ]
    (line,) = quantizers.verdicts(found)
    assert line == "m, 2 bits: gptq has 0.250 of the divergence of mlx-lm dwq (bar 0.45)"
    assert not list(quantizers.verdicts(found[:2]))
