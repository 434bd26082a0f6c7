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
    written = writer.windows(text, COUNT, SEED, told.append)
    assert written.shape == (COUNT, LENGTH) and told[-1] == COUNT * LENGTH
    assert told == sorted(told)
    pieces = np.lib.stride_tricks.sliding_window_view(text, BEGINNING, axis=1).reshape(
        -1, BEGINNING
    )
    for window in written:
        assert (pieces == window[:BEGINNING]).all(1).any()
    model, key = load_model(source, "float32"), mx.random.key(SEED)
    for part in (written[:3], written[3:]):
        logits = model(mx.array(part))
        for place in range(BEGINNING, LENGTH):
            key, own = mx.random.split(key)
            drawn = mx.random.categorical(logits[:, place - 1], key=own)
            assert drawn.tolist() == part[:, place].tolist()


def test_what_was_written_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_checkpoint(tmp_path / "source", config_4x())
    text = np.random.default_rng(0).integers(100, 300, (2, 12))

    def windows(count: int) -> np.ndarray:
        with Reader(source) as reader:
            weights = open_weights(source, reader)
            return own_text.own_text(weights, text, count, tmp_path / "own.npz", lambda _: None)

    first = windows(2)
    monkeypatch.setattr(Writer, "windows", lambda *_: pytest.fail("written again"))
    assert np.array_equal(windows(2), first)
    (tmp_path / "own.npz").unlink()
    # Of text enough nothing is written.
    assert windows(0).shape == (0, 12)
