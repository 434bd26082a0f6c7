"""How far from the original a planned model would be, on texts to judge by.

Of two plans a few windows often say for sure which is closer; only where they do not, all are read.
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
from apertus_mlx.convert.evaluation.evaluate import comparing_runs, token_errors
from apertus_mlx.convert.evaluation.layerwise import (
    ChangedWeights,
    SourceWeights,
    Weights,
    hidden_states,
)
from apertus_mlx.convert.evaluation.texts import Tokens, open_text, sample_windows
from apertus_mlx.convert.plan.plan import WINDOW_TOKENS, Plan
from apertus_mlx.convert.transforms.smoothing import rounding_of
from apertus_mlx.convert.transforms.weights import transformed_weights
from apertus_mlx.convert.write.keep import Keep
from apertus_mlx.quant import search
from apertus_mlx.quant.arrays import Float32, Float64, blocks

# Windows to calibrate a trial on, and windows to judge it by; fewer judge rounded codes, where only
# what is clearly better counts.
WINDOWS, ROUNDED_WINDOWS = 16, 6
# One in so many of them is read first.
FIRST = 4
# So many tokens in a row count as one observation. A mean is sure if it is so many standard errors
# from zero, or if so many observations or more all have its sign.
TOGETHER, SURE, UNANIMOUS = 64, 2.0, 8
# Rows of a matrix that are rounded at once.
BLOCK_ROWS = 4096

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Planned(ChangedWeights):
    """The weights that a plan leads to."""

    plan: Plan
    # Where calibrated codes lie.
    codes: Path
    # Instead of being calibrated, matrices are rounded to scales that are searched for with this.
    effort: search.Effort | None = None

    def matrix(self, path: str) -> Float32:
        """The weight of a module `[rows, columns]`, after a round trip through its format."""
        step = next(step for step in self.plan.steps if step.path == path)
        spec = step.spec
        if spec is None or step.transform not in ("quantize", "requantize"):
            return self.weights.matrix(path)
        if step.method == "gptq" and self.effort is None:
            codes, *others = read_codes(self.codes, step)
            scales, biases = (array.astype(mx.float32) for array in others)
            return np.array(mx.dequantize(codes, scales, biases, spec.group_size, spec.bits))
        weight = self.weights.matrix(path)
        rounding = rounding_of(step, self.effort or search.QUICK)
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
        # Runs of all windows to be read through a layer, of everything that is asked for.
        self._done, self._total = 0.0, 0
        self._folder = folder
        sample = calibration.sample
        few = replace(sample, windows=spread(sample.windows, WINDOWS))
        self._calibration = replace(calibration, sample=few)
        text = calibration.text or open_text(directory)
        sample = sample_windows(calibration.judged, *text, WINDOW_TOKENS, WINDOWS, SEED)
        self._windows = sample.windows

    def divergences(
        self, plans: Sequence[Plan], rounded: bool = False, share: float = 1.0
    ) -> list[float]:
        """Mean divergence of each plan's predictions from those of the source, in nats.

        Args:
            plans: what to judge.
            rounded: spares the calibration: codes are rounded to good scales instead.
            share: of two plans a few windows are enough if they say for sure whether the first has
                at most this share of the divergence of the second.
        """
        windows = spread(self._windows, ROUNDED_WINDOWS) if rounded else self._windows
        first = np.zeros(len(windows), bool)
        first[::FIRST] = True
        end = int(self._done + 1e-6) + self._runs(plans, rounded)
        self._total = max(self._total, end)
        found: list[list[Float64]] = [[] for _ in plans]
        for number, part in enumerate((windows[first], windows[~first])):
            if len(part):
                for plan, divergences in zip(plans, found, strict=True):
                    portion = len(part) / len(windows)
                    divergences.append(self._divergences(plan, part, number, rounded, portion))
            if len(plans) == 2 and is_sure(share * found[1][0] - found[0][0]):
                break
        # Not all has to be read, nor all that an interrupted run has done.
        self._report(end)
        for plan in plans:
            shutil.rmtree(self._folder / _name(plan, rounded), ignore_errors=True)
        return [float(np.concatenate(divergences).mean()) for divergences in found]

    def rounded_first(self, plans: Sequence[Plan], share: float) -> tuple[list[float], bool]:
        """`divergences` of two plans, with rounded codes if these show enough.

        Progress counts calibrated codes from the start, so that it never begins again.

        Args:
            plans: what to judge.
            share: rounded codes are enough if the first has at most this share of the divergence of
                the second.

        Returns:
            The divergences, and whether they are those of rounded codes.
        """
        before = int(self._done + 1e-6)
        self._total = before + self._runs(plans, True) + self._runs(plans, False)
        found = self.divergences(plans, True, share)
        if found[0] > share * found[1]:
            return self.divergences(plans), False
        self._report(self._total)
        return found, True

    def _runs(self, plans: Sequence[Plan], rounded: bool) -> int:
        """How often judging them runs through a layer, at most."""
        config = self._source.config
        # Scales of `--smooth` are found for rounded codes, too.
        made = sum(layer_runs(_rounded(plan) if rounded else plan) for plan in plans)
        read = config.num_hidden_layers * (1 + len(plans))
        return made + read + comparing_runs(config, config) * len(plans)

    def _divergences(
        self, plan: Plan, windows: Tokens, number: int, rounded: bool, portion: float
    ) -> Float64:
        """Of each token `[windows, length]`; `portion` says how much of all windows these are."""
        name = _name(plan, rounded)
        keep = Keep(self._folder / f"{name}-{number}.npz")
        kept = keep.load()
        if kept is not None:
            return np.asarray(kept[1]["divergences"], np.float64)
        file = self._folder / f"expected-{'rounded-' * rounded}{number}.npz"
        expected = self._states(self._source, windows, file, portion)
        folder = self._folder / name
        folder.mkdir(exist_ok=True)
        made = _rounded(plan) if rounded else plan
        if made.calibrates:
            begun = self._done
            make_codes(
                made, self._directory, self._calibration, folder,
                lambda done, _: self._report(begun + done),
            )  # fmt: skip
        weights = transformed_weights(plan, self._source.reader, folder)
        planned = Planned(weights, plan, folder, search.ROUGH if rounded else None)
        states = folder / f"states-{number}.npz"
        found = self._states(planned, windows, states, portion)
        before, runs = self._done, comparing_runs(self._source.config, self._source.config)
        (errors,) = token_errors(
            self._source, expected, planned, found, [windows],
            lambda done, total: self._report(before + portion * runs * done / total),
        )  # fmt: skip
        divergences = errors.divergence.reshape(windows.shape)
        keep.save({}, {"divergences": divergences})
        states.unlink(missing_ok=True)
        return divergences

    def _states(
        self, weights: Weights, windows: Tokens, file: Path, portion: float
    ) -> list[Float32]:
        before = self._done
        return hidden_states(
            weights, [windows],
            progress=lambda done: self._report(before + portion * done), keep=Keep(file),
        )  # fmt: skip

    def _report(self, done: float) -> None:
        self._done = done
        # Portions come to a whole but for rounding.
        self._progress(int(done + 1e-6), self._total)


def is_sure(excess: Float64) -> bool:
    """Whether the sign of the mean of `[windows, length]` is no chance.

    Divergences have long tails, which make standard errors large where all observations agree.
    """
    length = excess.shape[1] // TOGETHER * TOGETHER
    means = excess[:, :length].reshape(-1, TOGETHER).mean(1)
    if len(means) >= UNANIMOUS and ((means > 0).all() or (means < 0).all()):
        return True
    if len(means) < 2:
        return False
    return bool(abs(means.mean()) > SURE * means.std(ddof=1) / np.sqrt(len(means)))


def _name(plan: Plan, rounded: bool) -> str:
    """Of what is kept of it."""
    return f"{'rounded-' * rounded}{plan.fingerprint()[:16]}"


def _rounded(plan: Plan) -> Plan:
    steps = tuple(
        replace(step, method="search") if step.method == "gptq" else step for step in plan.steps
    )
    return replace(plan, steps=steps)


def kept_bytes(config: ModelConfig, codes_bytes: int) -> int:
    """Most that judging two plans has on disk: their calibration, and sets of hidden states.

    `codes_bytes` is what a plan's calibrated codes take.
    """
    tokens, rounded = WINDOWS * WINDOW_TOKENS, ROUNDED_WINDOWS * WINDOW_TOKENS
    states = 4 * (3 * tokens + rounded) * config.hidden_size
    # The divergence of each token.
    states += 8 * 2 * (tokens + rounded)
    return states + (2 * codes_bytes + calibrate.kept_bytes(config, tokens) if codes_bytes else 0)


def spread(windows: Tokens, count: int) -> Tokens:
    """At most `count` of some windows, evenly spaced."""
    chosen = np.linspace(0, len(windows) - 1, min(count, len(windows))).astype(int)
    return np.asarray(windows[chosen])
