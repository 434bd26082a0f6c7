"""Trains calibrated codes, their scales and biases, and norms end to end.

Calibration fits each matrix to its own inputs. Here all of them learn together to predict what the
original predicts, on windows of the calibration text. The original writes more of them itself, and
codes are calibrated on these too (`with_own_text`). Other windows of the text, which nothing learns
from, say whether the result is better than before; else nothing changes. The text that the output
is judged by is in neither. In large models codes stay (`plan.trained_by_tuning`), and no text is
written.

What is learnt lies beside the codes (`calibrated.read_codes`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from apertus_mlx.checkpoint import layout
from apertus_mlx.checkpoint.config import ModelConfig
from apertus_mlx.convert.calibration.calibrated import (
    NORMS,
    PARTS,
    TUNED,
    Calibration,
    read_codes,
    tuned_file,
)
from apertus_mlx.convert.calibration.held_out_comparison import Planned
from apertus_mlx.convert.calibration.own_text import own_text
from apertus_mlx.convert.distill.resources import Resources
from apertus_mlx.convert.distill.student import (
    RoundedNorm,
    assemble,
    quantized,
    stored_tensors,
)
from apertus_mlx.convert.distill.teacher_cache import TeacherCache, lot_bytes
from apertus_mlx.convert.distill.training import Options, Training, Validation, best
from apertus_mlx.convert.evaluation.layerwise import SourceWeights
from apertus_mlx.convert.evaluation.texts import Tokens
from apertus_mlx.convert.plan.plan import (
    CODES_LEARN_FROM,
    TUNING_TOKENS,
    Plan,
    trained_by_tuning,
)
from apertus_mlx.convert.sources.reading import MLX_TYPES, Reader
from apertus_mlx.convert.transforms.weights import transformed_weights
from apertus_mlx.convert.write.keep import Keep, save_arrays
from apertus_mlx.model.apertus import Model
from apertus_mlx.quant.arrays import blocks

_log = logging.getLogger("apertus_mlx")

# Where the state of the training lies, and what says that it is over.
TRAINING, RECORD, OWN = "tuning", "record.npz", "own.npz"
# One window in so many decides, at most so many do.
DECIDING_EVERY, MOST_DECIDING = 16, 16
# How often the text is seen: little text more often, and more of it where codes learn.
EPOCHS, TOKENS_SEEN = (4, 24), {"weights": 1 << 20, "scales": 1 << 18}
# Of scales and biases, relative to the typical scale, where codes learn and where they stay; and
# how much faster codes move: twice that, and they change on too little evidence.
LEARNING_RATES, CODES_FACTOR = {"weights": 1e-3, "scales": 2e-3}, 10.0
# Tokens that the original names at each position; all others count as one.
TOP_K = 128


@dataclass(frozen=True, slots=True)
class Tuning:
    """What a tuning takes: its windows, how they are learnt from, memory and disk."""

    config: ModelConfig
    # To learn from, and to decide by; `[windows, length]`.
    lessons: Tokens
    deciding: Tokens

    @classmethod
    def on(cls, config: ModelConfig, windows: Tokens) -> Tuning:
        """On the windows of a calibration, evenly divided; of a single one nothing decides."""
        count = min(max(len(windows) // DECIDING_EVERY, 1), MOST_DECIDING, len(windows) - 1)
        # In the middle of equal stretches.
        chosen = ((np.arange(count) + 0.5) * len(windows) / max(count, 1)).astype(int)
        deciding = {window.tobytes() for window in windows[chosen]}
        fresh = [window.tobytes() not in deciding for window in windows]
        return cls(config, windows[fresh], windows[chosen])

    @property
    def is_possible(self) -> bool:
        """Whether there is something to learn from and something to decide by."""
        return bool(len(self.lessons) and len(self.deciding))

    @property
    def own_windows(self) -> int:
        """How many windows the original is to write, to calibrate on and to learn from as well."""
        if not self.is_possible or trained_by_tuning(self.config) != "weights":
            return 0
        there = self.lessons.size + self.deciding.size
        return int(max(CODES_LEARN_FROM - there, 0) // self.lessons.shape[1])

    @property
    def own_tokens(self) -> int:
        """Tokens of these windows."""
        return int(self.own_windows * self.lessons.shape[1])

    def own_text(
        self, teacher: SourceWeights, folder: Path, progress: Callable[[int], None]
    ) -> Tokens:
        """These windows: written now, or by whoever asked before; `folder` is that of the codes."""
        place = folder / TRAINING
        place.mkdir(exist_ok=True)
        return own_text(teacher, self.lessons, self.own_windows, place / OWN, progress)

    @property
    def tokens(self) -> int:
        """To learn from, all together."""
        return int(self.lessons.size) + self.own_tokens

    @property
    def options(self) -> Options:
        """How to train."""
        least, most = EPOCHS
        trained = trained_by_tuning(self.config)
        epochs = min(max(TOKENS_SEEN[trained] // max(self.tokens, 1), least), most)
        # While codes change fast, states are worse than before: the rate has to fall to nothing.
        return Options(
            trained, epochs, LEARNING_RATES[trained], 0.0, TOP_K, patience=None,
            codes_factor=CODES_FACTOR,
        )  # fmt: skip

    @property
    def resources(self) -> Resources:
        """Memory and disk."""
        return Resources(
            self.config, trained_by_tuning(self.config), self.lessons.shape[1], TUNING_TOKENS
        )

    @property
    def disk_bytes(self) -> int:
        """Most that lies beside the output: the original's answers and what has been learnt."""
        tokens = self.tokens + self.deciding.size
        # Codes in a byte each, and scales, biases and norms with two moments of each.
        trained = trained_by_tuning(self.config)
        learnt = (2 if trained == "weights" else 1) * layout.parameter_count(self.config)
        return self.resources.disk_bytes(tokens, TOP_K) + lot_bytes(self.config, tokens) + learnt


def with_own_text(
    plan: Plan,
    source: Path,
    calibration: Calibration,
    folder: Path,
    progress: Callable[[int, int], None],
) -> Calibration:
    """`calibration` with what the original writes for `tune`, so that codes fit it from the start.

    Args:
        plan: with calibrated steps, to be tuned.
        source: the folder that it was made for.
        calibration: the windows that there are.
        folder: where the codes will be; what is written is kept in it.
        progress: told tokens that are written, of how many.
    """
    sample = calibration.sample
    tuning = Tuning.on(plan.source.config, sample.windows)
    if not tuning.own_windows:
        return calibration
    with Reader(source) as reader:
        teacher = SourceWeights(plan.source, reader, plan.request.allow_nonfinite)
        own = tuning.own_text(teacher, folder, lambda done: progress(done, tuning.own_tokens))
    windows = np.concatenate([sample.windows, own])
    return replace(calibration, sample=replace(sample, windows=windows))


def tune(
    plan: Plan,
    source: Path,
    calibration: Calibration,
    folder: Path,
    progress: Callable[[int, int], None],
) -> dict[str, Any]:
    """Train what `make_codes` has left in `folder`, unless an earlier run has.

    Args:
        plan: with calibrated steps.
        source: the folder that it was made for.
        calibration: the windows to learn from and to decide by.
        folder: of the codes; the state of an interrupted run lies in it as well.
        progress: told tokens that the original has answered or that were learnt from, of how many.

    Returns:
        What a manifest says about it; divergences in nats.
    """
    done = Keep(folder / TUNED / RECORD)
    if (kept := done.load()) is not None:
        return kept[0]
    began_s = time.monotonic()
    tuning = Tuning.on(plan.source.config, calibration.sample.windows)
    history: Sequence[Validation] = []
    if tuning.is_possible:
        student, history = _train(tuning, plan, source, folder, progress)
        if best(history, tuning.options).step > 0:
            _save(plan, student, folder)
    (folder / TUNED).mkdir(exist_ok=True)
    record = _record(tuning, history)
    done.save(record, {})
    minutes = (time.monotonic() - began_s) / 60
    # In the log alone: an output does not depend on how long it took.
    _log.info(f"{tuning_note(record)}; it took {minutes:.1f} minutes")
    return record


def _record(tuning: Tuning, history: Sequence[Validation]) -> dict[str, Any]:
    found: dict[str, Any] = {
        "windows": len(tuning.lessons),
        "own_windows": tuning.own_windows,
        "deciding_windows": len(tuning.deciding),
        "trained": tuning.options.trained,
        "epochs": tuning.options.epochs,
        "learning_rate": tuning.options.learning_rate,
        "tokens_seen": 0,
        "kl_before": None,
        "kl_after": None,
    }
    if history:
        found |= {
            "tokens_seen": history[-1].tokens,
            "kl_before": history[0].held_out_divergence,
            "kl_after": best(history, tuning.options).held_out_divergence,
        }
    return found


def _train(
    tuning: Tuning,
    plan: Plan,
    source: Path,
    folder: Path,
    progress: Callable[[int, int], None],
) -> tuple[Model, list[Validation]]:
    place = folder / TRAINING
    ready = tuning.deciding.size + tuning.tokens
    total = ready + tuning.options.epochs * tuning.tokens
    with Reader(source) as reader:
        teacher = SourceWeights(plan.source, reader, plan.request.allow_nonfinite)
        own = tuning.own_text(teacher, folder, lambda _: None)
        size = tuning.resources.batch_windows
        lessons, deciding = (
            TeacherCache(place / name, [windows[part] for part in blocks(len(windows), size)])
            for name, windows in (
                ("lessons", np.concatenate([tuning.lessons, own])),
                ("deciding", tuning.deciding),
            )
        )
        k = min(TOP_K, teacher.config.output_vocab_size - 1)
        deciding.fill(teacher, k, lambda done: progress(done, total))
        lessons.fill(teacher, k, lambda done: progress(deciding.tokens + done, total))
        student = _student(plan, reader, folder)
    by_layers = tuning.resources.by_layers
    training = Training(student, lessons, deciding, tuning.options, place, by_layers)
    history = training.run(lambda done, *_: progress(ready + done, total))
    return student, history


def _student(plan: Plan, reader: Reader, folder: Path) -> Model:
    """The model as `plan` would write it, of which `trained_by_tuning` says what may learn."""
    config = plan.source.config
    weights = Planned(transformed_weights(plan, reader, folder), plan, folder)
    steps = {step.path: step for step in plan.steps}
    modules: dict[str, nn.Module] = {}
    arrays: dict[str, mx.array] = {}
    types = {name: MLX_TYPES[steps[name].dtype] for name, _ in layout.vectors(config)}
    for matrix in layout.matrices(config):
        step = steps[matrix.path]
        if step.method == "gptq" and step.spec is not None:
            tensors = read_codes(folder, step)
            modules[matrix.path] = quantized(matrix, tensors, step.spec, MLX_TYPES[step.dtype])
        else:
            arrays[matrix.weight] = mx.array(weights.matrix(matrix.path))
    for name, shape in layout.vectors(config):
        value = mx.array(weights.vector(name)).reshape(shape)
        if name.endswith("norm.weight"):
            norm = RoundedNorm(value, config.rms_norm_eps, types[name])
            modules[name.removesuffix(".weight")] = norm
        else:
            arrays[name] = value
    return assemble(config, modules, arrays, types, trained_by_tuning(config))


def _save(plan: Plan, student: Model, folder: Path) -> None:
    (folder / TUNED).mkdir(exist_ok=True)
    tensors = {
        name: np.array(array if array.dtype == mx.uint32 else array.astype(mx.float32))
        for name, array in stored_tensors(student)
    }
    for step in plan.steps:
        if step.method == "gptq":
            found = {part: tensors.pop(f"{step.path}.{part}") for part in PARTS}
            save_arrays(tuned_file(folder, step.path), found)
    save_arrays(tuned_file(folder, NORMS), tensors)


def tuning_note(record: Mapping[str, Any]) -> str:
    """What a person should know about a tuning, in a sentence."""
    before, after = record["kl_before"], record["kl_after"]
    if before is None:
        return "--tune: too little text to learn from; nothing was tuned"
    if after >= before:
        return "--tune: on windows held out from it nothing got better; nothing was changed"
    return (
        f"--tune: on windows held out from it the mean divergence went from {before:.4g} to "
        f"{after:.4g}"
    )
