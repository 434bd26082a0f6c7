"""Which form of the model is chosen, and what happens when it cannot be had."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from apertus_mlx.backend.choose import load_for
from apertus_mlx.checkpoint.inventory import Inventory, take_inventory
from apertus_mlx.errors import RejectedError, UsageError
from apertus_mlx.model.apertus import Model
from tests.builders import config_4x, random_weights, write_checkpoint

pytest.importorskip("onnxruntime")
from apertus_mlx.backend.cpu.model import CPUModel


@pytest.fixture
def inventory(tmp_path: Path) -> Inventory:
    return take_inventory(write_checkpoint(tmp_path, config_4x(), tokenizer=False))


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx, "default_device", lambda: mx.cpu)


def test_auto_without_gpu(inventory: Inventory, no_gpu: None) -> None:
    assert isinstance(load_for(inventory), CPUModel)
    assert isinstance(load_for(inventory, dtype="float32"), CPUModel)
    assert isinstance(load_for(inventory, dtype="bfloat16"), Model)


def test_auto_with_gpu(inventory: Inventory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    monkeypatch.setattr("apertus_mlx.backend.choose.load_inventory", lambda *arguments: "plain")
    assert load_for(inventory) == "plain"
    assert isinstance(load_for(inventory, "cpu"), CPUModel)


def test_choices(inventory: Inventory) -> None:
    assert isinstance(load_for(inventory, "mlx"), Model)
    model = load_for(inventory, "cpu", precision="int8")
    assert isinstance(model, CPUModel) and model.precision == "int8"
    with pytest.raises(UsageError, match="--dtype bfloat16"):
        load_for(inventory, "cpu", "bfloat16")
    for dtype, compute in ((None, "mlx"), ("bfloat16", "auto")):
        with pytest.raises(UsageError, match="--precision int8 is for the CPU path"):
            load_for(inventory, compute, dtype, precision="int8")


def test_missing_library(
    inventory: Inventory,
    no_gpu: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setitem(sys.modules, "apertus_mlx.backend.cpu.model", None)
    with caplog.at_level(logging.WARNING):
        assert isinstance(load_for(inventory), Model)
    assert len(caplog.messages) == 1 and "slow" in caplog.messages[0]
    with pytest.raises(UsageError, match="needs pip install onnx onnxruntime"):
        load_for(inventory, "cpu")


def test_failing_library(
    inventory: Inventory,
    no_gpu: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as NoKernel

    def fail(*arguments: object) -> None:
        raise NoKernel("no kernel for\n MatMulNBits")

    monkeypatch.setattr("apertus_mlx.backend.cpu.model.CPUModel.__init__", fail)
    assert isinstance(load_for(inventory), Model)
    assert "no kernel for MatMulNBits" in caplog.messages[0]
    with pytest.raises(NoKernel):
        load_for(inventory, "cpu")


def test_damaged_weights_are_not_a_reason_to_fall_back(tmp_path: Path, no_gpu: None) -> None:
    weights = random_weights(config_4x())
    weights["model.norm.weight"][0] = float("inf")
    with pytest.raises(RejectedError, match="not finite"):
        load_for(take_inventory(write_checkpoint(tmp_path, config_4x(), weights, tokenizer=False)))


def test_what_only_mlx_can_run(
    tmp_path: Path, no_gpu: None, caplog: pytest.LogCaptureFixture
) -> None:
    """Heads of no multiple of 8 values, and an eps of xIELU that is not near 0."""
    weights = random_weights(config_4x())
    weights["model.layers.0.mlp.act_fn.eps"] = np.float32(0.5)
    folders = [
        write_checkpoint(tmp_path / "eps", config_4x(), weights, tokenizer=False),
        *(
            write_checkpoint(tmp_path / str(size), config_4x(head_dim=size), tokenizer=False)
            for size in (2, 12, 20)
        ),
    ]
    ids = mx.array([[1, 5, 9]])
    for folder in folders:
        inventory = take_inventory(folder)
        caplog.clear()
        model = load_for(inventory)
        assert isinstance(model, Model) and "--compute mlx" in caplog.messages[0]
        assert mx.isfinite(model(ids)).all()
        with pytest.raises(RejectedError, match="--compute mlx"):
            load_for(inventory, "cpu")


@pytest.mark.parametrize("size", [8, 24, 40])
def test_head_sizes_of_the_cpu_path(tmp_path: Path, no_gpu: None, size: int) -> None:
    inventory = take_inventory(write_checkpoint(tmp_path, config_4x(head_dim=size)))
    model, reference = load_for(inventory), load_for(inventory, "mlx")
    assert isinstance(model, CPUModel)
    ids = mx.array([[1, 5, 9, 70, 71]])
    assert mx.allclose(model(ids), reference(ids), atol=1e-4)


def test_bytes_are_told(inventory: Inventory) -> None:
    told: list[tuple[int, int]] = []
    load_for(inventory, "cpu", on_bytes=lambda *counts: told.append(counts))
    assert told == sorted(told)
    assert {total for _, total in told} == {inventory.checkpoint.size_bytes}
