"""Rotary frequencies against a published vector, and the formulas in their plain form."""

from __future__ import annotations

import numpy as np
import pytest

from apertus_mlx.checkpoint.config import Rope
from apertus_mlx.model.apertus import rotary_wavelengths

APERTUS_8B = Rope(12_000_000.0, "llama3", 8.0, 1.0, 4.0, 8192)
# Inverse frequencies of Apertus 8B at head_dim 128, by index.
INVERSE_8B = {
    0: 1.0, 1: 0.775153644, 16: 0.0169904424, 24: 1.49602789e-3, 25: 8.34575711e-4,
    26: 4.51598352e-4, 27: 2.32693877e-4, 28: 1.09853663e-4, 29: 7.74740056e-5,
    32: 3.60843918e-5, 48: 6.13089783e-7, 63: 1.34381961e-8,
}  # fmt: skip


def test_llama3_published_vector() -> None:
    inverse = 1 / np.array(rotary_wavelengths(128, APERTUS_8B))
    assert len(inverse) == 64
    for index, value in INVERSE_8B.items():
        assert inverse[index] == pytest.approx(value, rel=2e-7), index


def test_llama3_published_vector_of_a_small_head() -> None:
    inverse = 1 / np.array(rotary_wavelengths(8, APERTUS_8B))
    assert inverse == pytest.approx([1, 0.016990442, 3.6084392e-5, 6.1308978e-7], rel=2e-7)


def test_default_and_linear() -> None:
    waves = np.array(rotary_wavelengths(64, Rope(500_000.0)))
    assert waves == pytest.approx(500_000.0 ** (np.arange(0, 64, 2) / 64))
    assert np.array(rotary_wavelengths(64, Rope(500_000.0, "linear", 4.0))) == pytest.approx(
        4 * waves
    )
