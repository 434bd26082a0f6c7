"""How far from the original a planned model would be, on texts to judge by.

Written is only what an interrupted run goes on from.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
import numpy as np

from apertus_mlx.checkpoint.config import ModelConfig
from apertus_mlx.convert.calibration import calibrate
from apertus_mlx.convert.calibration.calibrated import (
    SEED,
    Calibration,
    layer_runs,
    make_codes,
    read_codes,
)
from apertus_mlx.convert.evaluation.evaluate import token_errors
from apertus_mlx.convert.evaluation.layerwise import ChangedWeights, SourceWeights, hidden_states
from apertus_mlx.convert.evaluation.texts import Tokens, open_text, sample_windows
from apertus_mlx.convert.plan.plan import WINDOW_TOKENS, Plan
from apertus_mlx.convert.transforms.smoothing import rounding_of
from apertus_mlx.convert.transforms.weights import transformed_weights
from apertus_mlx.convert.write.keep import Keep
from apertus_mlx.quant.arrays import Float32, blocks
from apertus_mlx.quant.metrics import summarise

# Windows to calibrate a trial on, and windows to judge it by; fewer judge rounded codes, where only
# what is clearly better counts.
WINDOWS, ROUNDED_WINDOWS = 16, 6
# Rows of a matrix that are rounded at once.
BLOCK_ROWS = 4096

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Planned(ChangedWeights):
    """The weights that a plan leads to."""

    plan: Plan
    # Where calibrated codes lie.
    codes: Path

    def matrix(self, path: str) -> Float32:
        """The weight of a module `[rows, columns]`, after a round trip through its format."""
        step = next(step for step in self.plan.steps if step.path == path)
        spec = step.spec
        if spec is None or step.transform not in ("quantize", "requantize"):
            return self.weights.matrix(path)
        if step.method == "gptq":
            codes, *others = read_codes(self.codes, step)
            scales, biases = (array.astype(mx.float32) for array in others)
            return np.array(mx.dequantize(codes, scales, biases, spec.group_size, spec.bits))
        weight = self.weights.matrix(path)
        rounding = rounding_of(step)
        for part in blocks(len(weight), BLOCK_ROWS):
            weight[part] = rounding(weight[part], np.ones(weight.shape[1]))
        return weight


class HeldOutComparison:
    """Measures plans for one source on the same windows."""

    def __init__(
        self,
        source: SourceWeights,
        directory: Path,
        calibration: Calibration,
        progress: Progress,
        folder: Path,
    ) -> None:
        self._source, self._directory, self._progress = source, directory, progress
        self._before = self._total = 0
        self._folder = folder
        sample = calibration.sample
        few = replace(sample, windows=spread(sample.windows, WINDOWS))
        self._calibration = replace(calibration, sample=few)
        text = calibration.text or open_text(directory)
        sample = sample_windows(calibration.judged, *text, WINDOW_TOKENS, WINDOWS, SEED)
        self._all = self._windows = sample.windows

    def divergences(self, plans: Sequence[Plan], rounded: bool = False) -> list[float]:
        """Mean divergence of each plan's predictions from those of the source, in nats.

        `rounded` spares the calibration: codes are rounded to the best scales instead.
        """
        self._windows = self._all
        if rounded:
            plans = list(map(_rounded, plans))
            self._windows = spread(self._all, ROUNDED_WINDOWS)
        depth = self._source.config.num_hidden_layers
        self._before, self._total = 0, depth + sum(map(_layer_runs, plans))
        found = []
        for plan in plans:
            found.append(self._divergence(plan))
            self._before += _layer_runs(plan)
        return found

    def _divergence(self, plan: Plan) -> float:
        name = plan.fingerprint()[:16]
        keep = Keep(self._folder / f"{name}.npz")
        kept = keep.load()
        if kept is not None:
            return float(kept[0]["divergence"])
        expected = hidden_states(
            self._source, [self._windows], progress=self._report,
            keep=Keep(self._folder / f"expected-{len(self._windows)}.npz"),
        )  # fmt: skip
        folder, depth = self._folder / name, plan.source.config.num_hidden_layers
        folder.mkdir(exist_ok=True)
        if plan.calibrates:
            make_codes(
                plan, self._directory, self._calibration, folder,
                lambda done, _: self._report(depth + done),
            )  # fmt: skip
        weights = transformed_weights(plan, self._source.reader, folder)
        planned = Planned(weights, plan, folder)
        found = hidden_states(
            planned, [self._windows],
            progress=lambda done: self._report(depth + layer_runs(plan) + done),
            keep=Keep(folder / "states.npz"),
        )  # fmt: skip
        errors = token_errors(self._source, expected, planned, found, [self._windows])
        divergence = summarise(errors[0]).kl_mean
        keep.save({"divergence": divergence}, {})
        shutil.rmtree(folder)
        return divergence

    def _report(self, done: int) -> None:
        self._progress(self._before + done, self._total)


def _rounded(plan: Plan) -> Plan:
    steps = tuple(
        replace(step, method="search") if step.method == "gptq" else step for step in plan.steps
    )
    return replace(plan, steps=steps)


def _layer_runs(plan: Plan) -> int:
    return layer_runs(plan) + plan.source.config.num_hidden_layers


def kept_bytes(config: ModelConfig, codes_bytes: int) -> int:
    """Most that judging a plan has on disk: its calibration and three sets of hidden states.

    `codes_bytes` is what its calibrated codes take.
    """
    tokens = WINDOWS * WINDOW_TOKENS
    states = 4 * (3 * tokens + ROUNDED_WINDOWS * WINDOW_TOKENS) * config.hidden_size
    return states + (codes_bytes + calibrate.kept_bytes(config, tokens) if codes_bytes else 0)


def spread(windows: Tokens, count: int) -> Tokens:
    """At most `count` of some windows, evenly spaced."""
    chosen = np.linspace(0, len(windows) - 1, min(count, len(windows))).astype(int)
    return np.asarray(windows[chosen])
