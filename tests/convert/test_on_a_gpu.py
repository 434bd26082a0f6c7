"""Whole conversions with calibration where MLX has a GPU: MLX fits them, and as well as NumPy."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import mlx.core as mx
import numpy as np
import pytest

from apertus_mlx.backend.mlx import load_model
from apertus_mlx.checkpoint import layout
from apertus_mlx.convert.calibration import fitting, sensitivity
from apertus_mlx.convert.calibration.fitting import Moments, Objective, fit
from apertus_mlx.convert.calibration.sensitivity import predict_divergences
from apertus_mlx.convert.evaluation.layerwise import open_weights
from apertus_mlx.convert.plan.planning import make_plan
from apertus_mlx.convert.plan.policy import Request
from apertus_mlx.convert.sources.reading import Reader
from apertus_mlx.convert.transforms.smoothing import rounding_of
from apertus_mlx.quant import search
from apertus_mlx.quant.spec import QuantSpec
from tests.builders import config_4x, write_checkpoint
from tests.resumable_work import make_work
from tests.simulated_gpu import simulated_card, simulated_mac


def log_shares(folder: Path) -> mx.array:
    """Logarithms of the shares of all tokens behind random ones, in float32."""
    ids = mx.array(np.random.default_rng(0).integers(5, 340, (8, 64)))
    logits = load_model(folder, "float32")(ids)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


@pytest.mark.parametrize(
    ("kind", "place"),
    [
        ("gptq", simulated_mac),
        ("tuned", simulated_card),
        ("target", simulated_mac),
    ],
)
def test_what_a_gpu_fits_predicts_as_well(kind: str, place: type, tmp_path: Path) -> None:
    work = make_work(kind, tmp_path)
    work.run(tmp_path / "numpy")
    with place():
        work.run(tmp_path / "mlx")
    wanted = log_shares(work.source)
    lost = [
        (mx.exp(wanted) * (wanted - log_shares(tmp_path / name))).sum(-1).mean().item()
        for name in ("numpy", "mlx")
    ]
    assert lost[1] <= 1.1 * lost[0]


@pytest.mark.parametrize("tied", [True, False])
def test_what_formats_cost_is_the_same(tied: bool, tmp_path: Path) -> None:
    """Of every matrix, by search and by GPTQ: MLX's figures within 2 % of NumPy's, most nearer."""
    config = config_4x(tie_word_embeddings=tied, vocab_size=352)
    folder = write_checkpoint(tmp_path / "model", config, tokenizer=False)
    windows = np.random.default_rng(1).integers(5, 340, (6, 48))
    found: list[dict[str, list[float]]] = []
    for name, place in (("numpy", nullcontext()), ("mlx", simulated_mac())):
        with place, Reader(folder) as reader:
            weights = open_weights(folder, reader)
            plan = make_plan(weights.source, Request(QuantSpec(3, 32), method="gptq"))
            steps = {step.path: step for step in plan.steps if step.spec is not None}
            assert steps.keys() == {each.path for each in layout.matrices(weights.config)}
            roundings = {path: {step.spec: rounding_of(step)} for path, step in steps.items()}
            (tmp_path / name).mkdir()
            # All rows are tried, so that no choice of them matters.
            with patch.object(sensitivity, "TRIAL_ROWS", 1 << 20):
                made = predict_divergences(
                    weights, roundings, windows, tmp_path / name, tuple(steps)
                )
        found.append(
            {path: [*made.final[path].values(), *made.rounded[path].values()] for path in steps}
        )
    wanted, seen = (np.array([each[path] for path in sorted(each)]) for each in found)
    np.testing.assert_allclose(seen, wanted, rtol=0.02)
    assert np.median(np.abs(seen / wanted - 1)) < 0.005


def test_a_search_holds_few_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all ranges of all rows MLX would hold some twenty; the scales found are the same."""
    weight = mx.array(np.random.default_rng(2).standard_normal((1024, 512)).astype(np.float32))
    spec, found = QuantSpec(3, 64), []
    for settled in (1 << 30, 1 << 16):
        monkeypatch.setattr(search, "SETTLED_WEIGHTS", settled)
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        codes = search.fit_columns(weight, spec, None, "BF16", search.QUICK)
        mx.eval(codes.codes, codes.scales, codes.biases)
        found.append((codes, (mx.get_peak_memory() - before) / weight.nbytes))
    assert found[0][1] > 10
    assert found[1][1] < 6
    for name in ("codes", "scales", "biases"):
        assert mx.array_equal(*(getattr(codes, name) for codes, _ in found))


@pytest.mark.parametrize("bits", [2, 4])
def test_fitting_holds_what_is_planned(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Moments and two factors, and 16 copies of the rows that are fitted at once."""
    rng = np.random.default_rng(3)
    columns, rows = 256, 1024
    weight = rng.standard_normal((2 * rows, columns)).astype(np.float32)
    inputs = rng.standard_normal((1, 600, columns)).astype(np.float32)
    monkeypatch.setattr(fitting, "BLOCK_ROWS", rows)
    monkeypatch.setattr(search, "SETTLED_WEIGHTS", 1 << 14)
    with simulated_mac():
        moments = Moments(weight)
        moments.add(mx.array(inputs), mx.array(inputs))
        objective = Objective.of(moments, 0.0)
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        fit(weight, QuantSpec(bits, 64), objective, "BF16")
        held = mx.get_peak_memory() - before
    assert held < 4 * (3 * columns**2 + 16 * rows * columns)
