"""Kept arrays: whole or absent, whatever has become of the file."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from apertus_mlx.convert.write.keep import Keep, load_arrays, save_arrays
from apertus_mlx.errors import RejectedError

ARRAYS = {"a": np.arange(12, dtype=np.float32).reshape(3, 4), "b": np.array([7, 8], np.int16)}


def test_any_flipped_bit_is_noticed_or_harmless(tmp_path: Path) -> None:
    """Each byte of the archive in turn: nothing else than the arrays as saved, or none."""
    path = tmp_path / "kept.npz"
    save_arrays(path, ARRAYS)
    data = path.read_bytes()
    for position in range(len(data)):
        for bit in (1, 128):
            spoilt = bytearray(data)
            spoilt[position] ^= bit
            path.write_bytes(spoilt)
            found = load_arrays(path)
            for name in found or ():
                if name in ARRAYS:
                    np.testing.assert_array_equal(found[name], ARRAYS[name])  # type: ignore[index]


def test_an_archive_cut_anywhere_counts_as_absent(tmp_path: Path) -> None:
    path = tmp_path / "kept.npz"
    keep = Keep(path)
    keep.save({"left": 3}, ARRAYS)
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        assert keep.load() is None
    path.write_bytes(data)
    found = keep.load()
    assert found is not None
    assert found[0] == {"left": 3}


@pytest.mark.timeout(20)
def test_a_fifo_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "kept.npz")
    with pytest.raises(RejectedError, match="not a regular file"):
        load_arrays(tmp_path / "kept.npz")
