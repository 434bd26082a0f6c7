"""Text that a model writes to learn from: the draws of the runtime's own predictions."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from apertus_mlx.backend.mlx import load_model
from apertus_mlx.convert.calibration import own_text
from apertus_mlx.convert.calibration.own_text import BEGINNING, Writer
from apertus_mlx.convert.evaluation.layerwise import open_weights
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
