"""TF32, which rounds factors of float32 products to 10 bits: off, and noticed where it is on."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress

import mlx.core as mx
import numpy as np
import pytest
from typer.testing import CliRunner

from apertus_mlx import cli, tools
from apertus_mlx.backend import tf32
from apertus_mlx.backend.mlx import load_model
from apertus_mlx.cli.app import app
from apertus_mlx.errors import ApertusError
from apertus_mlx.hub.demo import model_dir
from apertus_mlx.measure.doctor import visit
from apertus_mlx.measure.doctor.facts import PRODUCT_BOUND, gather_facts, product_errors


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_ENABLE_TF32", "1")
    monkeypatch.delenv("MLX_ENABLE_TF32")
    monkeypatch.setattr(sys, "argv", ["apertus-mlx", "models", "--no-such-option"])


@pytest.mark.parametrize(
    "promise",
    [
        lambda: load_model(model_dir()),
        lambda: tools.evaluate([], reference="nowhere/to-be-found", offline=True),
        lambda: tools.distill("nowhere/to-be-found", "nowhere", learning_rate=7),
        lambda: tools.convert_model("/nowhere/to-be-found", bits=77),
        cli._command,
    ],
    ids=["load", "evaluate", "distill", "convert", "command"],
)
def test_whatever_promises_float32_switches_it_off(promise: Callable[[], object]) -> None:
    with suppress(ApertusError):
        promise()
    assert os.environ["MLX_ENABLE_TF32"] == "0"


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not tf32.asked_for()
    monkeypatch.setenv("MLX_ENABLE_TF32", "1")
    tf32.switch_off()
    assert tf32.asked_for()
    assert gather_facts().mlx_variables["MLX_ENABLE_TF32"] == "1"


def in_tf32(x: mx.array) -> mx.array:
    """Rounded to 10 bits after the leading one, as the tensor units take it."""
    bits = np.array(x).view(np.uint32)
    return mx.array(((bits + 0x1000) & 0xFFFFE000).view(np.float32))


def simulate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of two and more rows as such a GPU computes them."""
    dense, coded = mx.array.__matmul__, mx.quantized_matmul

    def matmul(x: mx.array, y: mx.array) -> mx.array:
        return dense(in_tf32(x), in_tf32(y)) if x.shape[0] > 1 else dense(x, y)

    def quantized(x: mx.array, *codes: mx.array, **settings: int) -> mx.array:
        return coded(in_tf32(x) if x.shape[0] > 1 else x, *codes, **settings)

    monkeypatch.setattr(mx.array, "__matmul__", matmul)
    monkeypatch.setattr(mx, "quantized_matmul", quantized)


def test_the_doctor_sees_it_in_64_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    assert max(product_errors().values()) <= PRODUCT_BOUND
    simulate(monkeypatch)
    errors = product_errors()
    assert errors["float32 product"] <= PRODUCT_BOUND
    assert errors["4-bit product"] <= PRODUCT_BOUND
    # Two factors, each rounded by up to 2^-11.
    assert 1e-4 < errors["float32 product of 64 rows"] < 2**-10
    assert 1e-4 < errors["4-bit product of 64 rows"] < 2**-11


@pytest.mark.parametrize(("value", "way_out"), [("1", "unset it"), ("0", "pip install")])
def test_the_doctor_names_the_variable(
    value: str, way_out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLX_ENABLE_TF32", value)
    monkeypatch.setattr(visit, "product_errors", lambda: {"float32 product of 64 rows": 3e-4})
    result = CliRunner().invoke(app, ["doctor"])
    assert "float32 product of 64 rows: WRONG, error 3.0e-04" in result.stdout
    assert f"MLX_ENABLE_TF32={value}" in result.stdout
    assert way_out in str(result.exception)
