"""How many windows a comparison of two plans reads, and what it says of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from apertus_mlx.backend.mlx import load_model
from apertus_mlx.convert.calibration import allocation, held_out_comparison
from apertus_mlx.convert.calibration.calibrated import Calibration
from apertus_mlx.convert.calibration.held_out_comparison import HeldOutComparison, is_sure
from apertus_mlx.convert.calibration.sensitivity import Prediction
from apertus_mlx.convert.evaluation.layerwise import SourceWeights, open_weights
from apertus_mlx.convert.evaluation.texts import Document, Sample, TextSet
from apertus_mlx.convert.job import convert, prepare
from apertus_mlx.convert.plan.planning import make_plan
from apertus_mlx.convert.plan.policy import Request
from apertus_mlx.convert.sources.reading import Reader
from apertus_mlx.quant.metrics import log_softmax
from apertus_mlx.quant.spec import QuantSpec
from tests.builders import config_4x, write_checkpoint

WIDTHS = {bits: QuantSpec(bits, 32) for bits in (2, 3, 4, 8)}


def test_chance_is_seldom_taken_for_a_difference() -> None:
    """Of 500 comparisons of two equal models some one in twenty; of clear ones nearly none fails.

    Tokens have long tails, and those beside each other are alike.
    """
    draw = np.random.default_rng(0)

    def excess(mean: float) -> np.ndarray:
        sizes = np.exp(1.5 * draw.standard_normal((2, 64))).repeat(8, axis=1)
        return sizes * (mean + draw.standard_normal((2, 512)))

    assert sum(is_sure(excess(0.0)) for _ in range(500)) < 50
    assert sum(is_sure(excess(sign * 0.5)) for sign in (-1, 1) for _ in range(50)) > 95
    assert not is_sure(np.ones((3, 63)))
    assert not is_sure(np.zeros((0, 512)))


def judged(
    folder: Path, plans: list[int], monkeypatch: pytest.MonkeyPatch
) -> tuple[list[float], list[np.ndarray]]:
    """Divergences at the widths `plans`, and the windows that were read for them."""
    source = write_checkpoint(folder / "source", config_4x(), dtype=mx.bfloat16)
    texts = tuple(Document("en", f"Line {n} has {n * n} birds.") for n in range(400))
    calibration = Calibration(
        Sample(np.zeros((1, 8), np.int64), "", "", 0), TextSet("", "", texts, held_out=True)
    )
    read: list[np.ndarray] = []
    states = held_out_comparison.hidden_states

    def watched(weights: Any, groups: list[np.ndarray], **named: Any) -> Any:
        if isinstance(weights, SourceWeights):
            read.extend(groups)
        return states(weights, groups, **named)

    monkeypatch.setattr(held_out_comparison, "hidden_states", watched)
    monkeypatch.setattr(held_out_comparison, "WINDOW_TOKENS", 128)
    (folder / "kept").mkdir()
    with Reader(source) as reader:
        weights = open_weights(source, reader)
        requests = [Request(WIDTHS[bits], method="rtn") for bits in plans]
        found = HeldOutComparison(
            weights, source, calibration, lambda *_: None, folder / "kept"
        ).divergences([make_plan(weights.source, request) for request in requests])
    return found, [window for part in read for window in part]


def test_few_windows_are_read_where_they_say_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside what the runtime computes there from the written model."""
    found, windows = judged(tmp_path, [2, 8], monkeypatch)
    # Each plan asks for the original's, which is kept.
    unique = np.unique(windows, axis=0)
    assert len(unique) == 4
    source = tmp_path / "source"
    written = convert(prepare(source, Request(WIDTHS[2], method="rtn"), "x"), tmp_path / "out")
    logs = [
        log_softmax(np.array(load_model(folder, "float32")(mx.array(unique))).reshape(-1, 384))
        for folder in (source, written)
    ]
    expected = (np.exp(logs[0]) * (logs[0] - logs[1])).sum(-1).mean()
    assert found[0] == pytest.approx(expected, rel=1e-3)
    assert not list((tmp_path / "kept").glob("*/"))


def test_all_windows_are_read_where_nothing_tells_two_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, windows = judged(tmp_path, [4, 4], monkeypatch)
    assert found[0] == found[1]
    assert len(np.unique(windows, axis=0)) == 16


def test_progress_of_rounded_codes_counts_what_smoothing_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs through a layer: of the original and of each plan, and of smoothing for each.

    Comparing the logits of a plan counts as two.
    """
    monkeypatch.setattr(held_out_comparison, "is_sure", lambda _: False)
    monkeypatch.setattr(held_out_comparison, "WINDOW_TOKENS", 32)
    source = write_checkpoint(tmp_path / "source", config_4x(), dtype=mx.bfloat16)
    texts = tuple(Document("en", f"Line {n} has {n * n} birds.") for n in range(20))
    calibration = Calibration(
        Sample(np.arange(64, dtype=np.int64).reshape(2, 32), "", "", 0),
        TextSet("", "", texts, held_out=True),
    )
    (tmp_path / "kept").mkdir()
    told: list[tuple[int, int]] = []
    with Reader(source) as reader:
        weights = open_weights(source, reader)
        plans = [
            make_plan(weights.source, Request(WIDTHS[bits], method="gptq", smooth=True))
            for bits in (3, 4)
        ]
        HeldOutComparison(
            weights, source, calibration, lambda *each: told.append(each), tmp_path / "kept"
        ).divergences(plans, rounded=True)
    depth = weights.config.num_hidden_layers
    assert told[-1] == ((3 + 2) * depth + 2 * 2,) * 2
    assert told == sorted(told)


@pytest.mark.parametrize(
    ("final", "rounded", "share"),
    [
        # 0.6 of the uniform width is expected where rounding shows 0.9: 1.2 would do, 1 must be.
        ((6, 10), (9, 10), 1.0),
        # Calibration gains as much for both.
        ((9, 10), (18, 20), 0.8),
        # It gains more with the uniform width: 0.9 becomes 1, so 0.72 must be seen.
        ((10, 10), (9, 10), 0.72),
    ],
)
def test_what_rounding_has_to_show(
    final: tuple[float, float], rounded: tuple[float, float], share: float
) -> None:
    own, rival = WIDTHS[2], WIDTHS[3]
    tables = [{"m": dict(zip((own, rival), values, strict=True))} for values in (final, rounded)]
    found = allocation._clearly(Prediction(*tables), {"m": own}, rival)
    assert found == pytest.approx(share)
