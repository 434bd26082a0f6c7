"""Text that a model writes to learn from: the draws of the runtime's own predictions."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from apertus_mlx.backend.mlx import load_model
from apertus_mlx.checkpoint.config import parse_config
from apertus_mlx.convert.calibration import own_text
from apertus_mlx.convert.calibration.own_text import BEGINNING, Writer
from apertus_mlx.convert.evaluation.layerwise import open_weights
from apertus_mlx.convert.plan.plan import tuning_memory_bytes
from apertus_mlx.convert.plan.writing_memory import writing_memory_bytes
from apertus_mlx.convert.sources.reading import Reader
from apertus_mlx.convert.write.keep import Keep
from tests.builders import config_4x, write_checkpoint

LENGTH, COUNT, SEED = 20, 5, 7


@pytest.mark.parametrize("tied", [True, False])
def test_each_token_is_drawn_from_what_the_runtime_predicts(
    tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The runtime reads what was written as a whole, and draws with the same random keys."""
    monkeypatch.setattr(own_text, "TOGETHER", 3)
    source = write_checkpoint(tmp_path / "source", config_4x(tie_word_embeddings=tied))
    text = np.random.default_rng(0).integers(100, 300, (4, LENGTH))
    told: list[int] = []
    with Reader(source) as reader:
        writer = Writer(open_weights(source, reader))
    *_, written = writer.windows(text, COUNT, SEED, told.append, text[:0])
    assert written.shape == (COUNT, LENGTH) and told[-1] == COUNT * LENGTH
    assert told == sorted(told)
    pieces = np.lib.stride_tricks.sliding_window_view(text, BEGINNING, axis=1).reshape(
        -1, BEGINNING
    )
    for window in written:
        assert (pieces == window[:BEGINNING]).all(1).any()
    model = load_model(source, "float32")
    for first, part in ((0, written[:3]), (3, written[3:])):
        logits, key = model(mx.array(part)), mx.random.key(SEED + first)
        for place in range(BEGINNING, LENGTH):
            key, own = mx.random.split(key)
            drawn = mx.random.categorical(logits[:, place - 1], key=own)
            assert drawn.tolist() == part[:, place].tolist()


@pytest.mark.without_gpu
@pytest.mark.parametrize("tied", [True, False])
def test_memory_is_as_planned(tied: bool, tmp_path: Path) -> None:
    """Beside what MLX and NumPy hold while a part is written."""
    config = config_4x(tie_word_embeddings=tied, vocab_size=16384)
    source = write_checkpoint(tmp_path / "source", config, tokenizer=False)
    text = np.random.default_rng(0).integers(100, 300, (4, 12))
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    with Reader(source) as reader:
        weights = open_weights(source, reader)
        writer = Writer(weights)
        tracemalloc.start()
        try:
            for _ in writer.windows(text, own_text.TOGETHER, SEED, lambda _: None, text[:0]):
                pass
            held = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    held += mx.get_peak_memory() - before
    planned = writing_memory_bytes(weights.config, 12)
    assert 0.95 * held < planned < 1.25 * held


def test_writing_is_planned_where_it_takes_more_than_training() -> None:
    """Just below the size up to which codes learn, and above it, where nothing is written."""
    sizes = {
        "hidden_size": 1024, "intermediate_size": 2048, "num_attention_heads": 8,
        "num_key_value_heads": 8, "vocab_size": 130_000, "tie_word_embeddings": True,
    }  # fmt: skip
    config = parse_config(config_4x(**sizes, num_hidden_layers=16))
    weights = 130_000 * 1024 + 16 * (4 * 1024 * 1024 + 2 * 1024 * 2048)
    cache = 17 * 2 * 64 * 512 * 1024
    expected = 4 * (weights + cache + 3 * 64 * 130_000)
    assert 5.5e9 < expected < 6e9
    assert tuning_memory_bytes(config) == pytest.approx(expected, rel=1e-3)
    larger = parse_config(config_4x(**sizes, num_hidden_layers=17))
    assert tuning_memory_bytes(larger) < expected


def test_what_was_written_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole for whoever asks again; in part for a run that goes on, which writes what is left."""
    monkeypatch.setattr(own_text, "TOGETHER", 2)
    monkeypatch.setattr(Keep, "least_s", 0.0)
    source = write_checkpoint(tmp_path / "source", config_4x())
    text = np.random.default_rng(0).integers(100, 300, (2, 12))
    told: list[int] = []

    def windows(count: int, name: str, most: int | None = None) -> np.ndarray:
        def tell(done: int) -> None:
            told.append(done)
            if most is not None and done > most:
                raise KeyboardInterrupt

        with Reader(source) as reader:
            weights = open_weights(source, reader)
            return own_text.own_text(weights, text, count, tmp_path / name, tell)

    whole = windows(COUNT, "whole.npz")
    with pytest.raises(KeyboardInterrupt):
        windows(COUNT, "part.npz", 3 * 12)
    told.clear()
    assert np.array_equal(windows(COUNT, "part.npz"), whole)
    assert min(told) > 2 * 12
    monkeypatch.setattr(Writer, "windows", lambda *_: pytest.fail("written again"))
    assert np.array_equal(windows(COUNT, "part.npz"), whole)
    # Of text enough nothing is written.
    assert windows(0, "nothing.npz").shape == (0, 12)
