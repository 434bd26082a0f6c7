"""`convert --plan` says disk and minutes, of which an interrupted run has left a measure."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from apertus_mlx.checkpoint.config import read_config
from apertus_mlx.checkpoint.tensors import open_checkpoint
from apertus_mlx.cli.app import app
from apertus_mlx.convert.calibration import calibrate, pace
from apertus_mlx.convert.calibration.pace import calibration_operations
from apertus_mlx.convert.evaluation import little_text
from apertus_mlx.convert.plan.planning import make_plan
from apertus_mlx.convert.plan.policy import Request
from apertus_mlx.convert.sources.recognise import recognise
from apertus_mlx.quant.spec import QuantSpec
from tests.resumable_work import make_work


@pytest.mark.without_gpu
def test_a_fitted_layer_says_how_long_all_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each run through a layer takes a minute here; an error comes at the last of four."""
    work = make_work("plain", tmp_path)
    clock = itertools.count(0, 60)
    monkeypatch.setattr(pace, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(little_text, "ENOUGH_TOKENS", 1)
    command = [
        "convert", str(work.source), str(tmp_path / "out"), "--calibration", str(work.text),
        "--bits", "3", "--group-size", "32", "--method", "gptq",
    ]  # fmt: skip

    def planned() -> dict[str, Any]:
        app([*command, "--plan", "--json"], standalone_mode=False)
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    before = planned()
    assert 0 < before["minutes"] < 1
    assert before["disk_bytes"] > before["output_bytes"] + (tmp_path / "en.txt").stat().st_size
    quantize = calibrate._quantize_layer

    def interrupted(layer: Any, *rest: Any) -> Any:
        assert not layer.path.endswith(".1")
        return quantize(layer, *rest)

    monkeypatch.setattr(calibrate, "_quantize_layer", interrupted)
    with pytest.raises(AssertionError):
        app(command, standalone_mode=False)
    # Of three runs two are timed; the second pass takes longer than the first.
    assert 2 < planned()["minutes"] < 4
    app([*command, "--plan"], standalone_mode=False)
    assert "calibration       about 3 minutes here" in capsys.readouterr().out


@pytest.mark.parametrize(("bits", "each", "by_column"), [(2, 50_000, 12), (3, 30_000, 9)])
def test_operations_of_a_pass(tmp_path: Path, bits: int, each: int, by_column: int) -> None:
    """Counted by hand for 10 tokens: q and o are alike, k and v too, then come up and down."""
    source = make_work("plain", tmp_path).source
    found = recognise(read_config(source), open_checkpoint(source).tensors, "source")
    plan = make_plan(found, Request(QuantSpec(bits, 32), method="gptq"))
    shapes = [(64, 64)] * 2 + [(32, 64)] * 2 + [(128, 64), (64, 128)]
    ahead = sum(20 * rows * columns for rows, columns in shapes)
    fitted = sum(
        40 * rows * columns + 40 * columns**2 + rows * columns * (each + by_column * columns)
        for rows, columns in shapes
    )
    ends = 2 * 352 * 64 * (20 + each + by_column * 64)
    for runs, expected in enumerate([0, ahead, 2 * ahead, 2 * ahead + ends + fitted]):
        assert calibration_operations(plan, 10, runs) == pytest.approx(expected)
