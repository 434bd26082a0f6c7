"""What long work has reached is saved, but not all the time."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from apertus_mlx.convert.write.keep import Keep


def test_what_is_reached_is_saved_once_a_minute(tmp_path: Path) -> None:
    now = 1000.0
    keep = Keep(tmp_path / "kept.npz", lambda: now)
    saved = []
    for layer in range(20):
        now += 25.0
        keep.reach({"layers": layer}, {"stream": np.full(3, layer, np.float32)})
        kept = keep.load()
        saved.append(-1 if kept is None else kept[0]["layers"])
        assert kept is None or (kept[1]["stream"] == saved[-1]).all()
    assert saved == [-1, -1, *(layer // 3 * 3 - 1 for layer in range(3, 21))][:20]


def test_where_a_layer_takes_longer_each_is_saved(tmp_path: Path) -> None:
    now = 0.0
    keep = Keep(tmp_path / "kept.npz", lambda: now)
    for layer in range(3):
        now += Keep.least_s
        keep.reach({"layers": layer}, {})
        assert keep.load() == ({"layers": layer}, {})


def test_what_is_done_is_saved_at_once(tmp_path: Path) -> None:
    keep = Keep(tmp_path / "kept.npz", lambda: 0.0)
    for layers in range(2):
        keep.save({"layers": layers}, {})
        assert keep.load() == ({"layers": layers}, {})
