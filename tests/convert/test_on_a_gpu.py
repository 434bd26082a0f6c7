"""Whole conversions with calibration where MLX has a GPU: MLX fits them, and as well as NumPy."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from apertus_mlx.backend.mlx import load_model
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
        pytest.param("target", simulated_mac, marks=pytest.mark.nightly),
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
