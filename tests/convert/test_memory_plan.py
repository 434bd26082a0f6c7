"""What a plan says that calibration takes, beside what NumPy really holds."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from apertus_mlx.checkpoint import layout
from apertus_mlx.checkpoint.config import parse_config
from apertus_mlx.convert.calibration import fitting
from apertus_mlx.convert.calibration.calibrate import quantize_model
from apertus_mlx.convert.calibration.fitting import Moments, Objective, fit
from apertus_mlx.convert.calibration.tuning import Tuning
from apertus_mlx.convert.evaluation.evaluate import token_errors
from apertus_mlx.convert.evaluation.layerwise import open_weights
from apertus_mlx.convert.plan import plan
from apertus_mlx.convert.plan.plan import calibration_memory_bytes
from apertus_mlx.convert.sources import reading
from apertus_mlx.convert.sources.reading import Reader
from apertus_mlx.quant import curvature
from apertus_mlx.quant.spec import QuantSpec
from tests.builders import config_4x, write_checkpoint

COLUMNS, ROWS = 1536, 16


def held_at_most() -> int:
    """Bytes of NumPy's while one matrix is fitted to two streams, of which there are moments."""
    draw = np.random.default_rng(0)
    # More rows than half the columns, so that what is missing is a square as well.
    tall = draw.standard_normal((COLUMNS, COLUMNS), np.float32)
    streams = draw.standard_normal((2, 1, 2 * COLUMNS, COLUMNS), np.float32)
    original, quantized = mx.array(streams[0]), mx.array(streams[0] + 0.1 * streams[1])
    tracemalloc.start()
    try:
        moments = Moments(tall)
        moments.add(original, quantized)
        objective = Objective.of(moments, 1.0)
        del moments
        tracemalloc.reset_peak()
        fit(tall[:ROWS], QuantSpec(3, 32), objective, "BF16")
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.without_gpu
def test_the_second_factor_of_fits_in_groups_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales that are found group by group take a square more than others, as the plan says."""
    monkeypatch.setattr(fitting, "has_gpu", lambda: False)
    # At real widths blocks are as narrow beside the square.
    monkeypatch.setattr(curvature, "BLOCK_COLUMNS", 32)
    config = parse_config(config_4x(hidden_size=COLUMNS, intermediate_size=64, head_dim=32))
    planned, held = [], []
    for most in (COLUMNS, 0):
        for module in (plan, fitting):
            monkeypatch.setattr(module, "GROUPWISE_COLUMNS", most)
        planned.append(calibration_memory_bytes(config))
        held.append(held_at_most())
    assert held[0] - held[1] > 0.9 * 4 * COLUMNS**2
    assert planned[0] - planned[1] == pytest.approx(held[0] - held[1], rel=0.15)


@pytest.mark.parametrize("tied", [True, False])
def test_an_embedding_is_held_once(
    tmp_path: Path, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the largest matrix: beside it stand its codes, and what fits a block of its rows."""
    # What is held of it at once while it is read and fitted.
    monkeypatch.setattr(fitting, "BLOCK_ROWS", 64)
    monkeypatch.setattr(reading, "BLOCK_BYTES", 2**16)
    config = config_4x(vocab_size=20_000, tie_word_embeddings=tied)
    folder = write_checkpoint(tmp_path / "model", config)
    numbers = 20_000 * config["hidden_size"]
    with Reader(folder) as reader:
        weights = open_weights(folder, reader)
        specs = {layout.EMBEDDING: QuantSpec(4, 64)}
        tracemalloc.start()
        try:
            peaks = []
            for _ in quantize_model(weights, specs, np.arange(8).reshape(2, 4)):
                peaks.append(tracemalloc.get_traced_memory()[1] / numbers)
                tracemalloc.reset_peak()
            peaks.append(tracemalloc.get_traced_memory()[1] / numbers)
        finally:
            tracemalloc.stop()
    # Bytes of a weight in float32 and of its code; afterwards of the code.
    assert peaks[0] < 4 + 1 + 1
    assert peaks[1] < 1 + 1


def test_the_heads_that_an_evaluation_compares_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both, in float32."""
    monkeypatch.setattr(reading, "BLOCK_BYTES", 2**16)
    config = config_4x(vocab_size=60_000, tie_word_embeddings=True)
    folder = write_checkpoint(tmp_path / "model", config)
    hidden = [np.ones((1, 1, config["hidden_size"]), np.float32)]
    with Reader(folder) as reader:
        weights = open_weights(folder, reader)
        tracemalloc.start()
        try:
            token_errors(weights, hidden, weights, hidden, [np.zeros((1, 1), np.int64)])
            held = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    monkeypatch.setattr(plan, "CALIBRATION_TOKENS", 0)
    assert 0.9 * held < calibration_memory_bytes(parse_config(config))


def test_text_that_the_original_writes_is_counted() -> None:
    """Two streams of hidden states and of attention's in float32; nothing where codes stay."""
    config = parse_config(config_4x(hidden_size=64, intermediate_size=128, head_dim=32))
    queries = config.num_attention_heads * config.head_dim
    windows = np.arange(128 * 512).reshape(128, 512)
    own = Tuning.on(config, windows).own_tokens
    assert own > 0
    expected = 2 * own * (64 + queries) * 4
    assert calibration_memory_bytes(config, True) - calibration_memory_bytes(config) == expected
    large = parse_config(config_4x(hidden_size=4096, intermediate_size=21504, head_dim=128))
    assert not Tuning.on(large, windows).own_tokens
    assert calibration_memory_bytes(large, True) == calibration_memory_bytes(large)
