"""The calibrated part of a conversion: which text, the codes of each matrix, and the evaluation.

All codes are made before the output is written, since its order is not that of the layers. Until
the output is published they lie in a folder beside it, with the state of the calibration. An
interrupted run repeats only the layer that it was in.
"""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from apertus_mlx.convert.calibration import calibrate
from apertus_mlx.convert.calibration.calibrate import quantize_model
from apertus_mlx.convert.calibration.pace import Pace
from apertus_mlx.convert.evaluation.layerwise import ChangedWeights, Weights
from apertus_mlx.convert.evaluation.texts import (
    OpenText,
    Sample,
    TextSet,
    hold_out,
    open_text,
    read_texts,
    sample_windows,
)
from apertus_mlx.convert.plan.plan import CALIBRATION_TOKENS, WINDOW_TOKENS, Plan, Step
from apertus_mlx.convert.sources.reading import MLX_TYPES, Reader
from apertus_mlx.convert.transforms.smoothing import rounding_of, smoothing_scales
from apertus_mlx.convert.transforms.weights import SCALES, transformed_weights, unscaled_weights
from apertus_mlx.convert.write.keep import Keep, load_arrays, save_arrays
from apertus_mlx.errors import ResourceError
from apertus_mlx.quant.arrays import Float32
from apertus_mlx.system.whole_file import whole_file

# In the folder of the codes: that all of them are there, and how far smoothing is.
DONE = "done"
SMOOTHING = "smoothing.npz"
WINDOWS = CALIBRATION_TOKENS // WINDOW_TOKENS
SEED = 0
# Where tuned scales and biases lie, and the file of the norms among them (`tuning`).
TUNED, NORMS = "tuned", "norms"
# What becomes of a matrix, in the order of the tensors of its step.
PARTS = ("weight", "scales", "biases")


@dataclass(frozen=True, slots=True)
class Calibration:
    """Windows to calibrate on, and texts held out from them to judge the result by."""

    sample: Sample
    judged: TextSet
    # Tokenizer and chat template that both are read with, where they are not the source's.
    text: OpenText | None = None

    def digest(self) -> str:
        """Of all that a result depends on."""
        windows = np.ascontiguousarray(self.sample.windows)
        digest = hashlib.sha256(repr(windows.shape).encode() + windows.tobytes())
        return digest.hexdigest() + self.sample.sha256 + self.judged.sha256


@dataclass(frozen=True, slots=True)
class _OtherVectors(ChangedWeights):
    """Weights with some other vectors, by name."""

    vectors: Mapping[str, Float32]

    def vector(self, name: str) -> Float32:
        """A norm's weight or a parameter of an activation."""
        return self.vectors[name] if name in self.vectors else self.weights.vector(name)


def prepare_calibration(
    directory: Path, paths: Sequence[Path], text: OpenText | None = None
) -> Calibration:
    """Read the texts, keep a part to judge by, and cut windows for the model in `directory`.

    `text` is what it reads with, where that is not the tokenizer and template there.

    Raises:
        ApertusError: see `read_texts` and `sample_windows`.
    """
    seen, judged = hold_out(read_texts(paths))
    opened = text or open_text(directory)
    sample = sample_windows(seen, *opened, WINDOW_TOKENS, WINDOWS, SEED)
    return Calibration(sample, judged, text)


def make_codes(
    plan: Plan,
    source: Path,
    calibration: Calibration,
    folder: Path,
    progress: Callable[[int, int], None],
) -> None:
    """Find what `plan` needs texts for: scales and codes, written into `folder`.

    The folder belongs to this plan and these texts; what an interrupted run has finished in it is
    used again.

    Raises:
        RejectedError: a source value is not finite.
    """
    steps = {step.path: step for step in plan.steps if step.method == "gptq"}
    specs = {path: step.spec for path, step in steps.items() if step.spec is not None}
    there = [file for path in steps if (file := _code_file(folder, path)).exists()]
    is_done = (folder / DONE).exists()
    if (is_done and len(there) < len(steps)) or None in map(load_arrays, there):
        # Files are whole or absent unless a disk failed; then the rest is not to be trusted either.
        shutil.rmtree(folder)
        folder.mkdir()
    elif is_done:
        return
    windows = calibration.sample.windows
    with Reader(source) as reader:
        depth = plan.source.config.num_hidden_layers
        before, total = depth if plan.request.smooth else 0, layer_runs(plan)
        if plan.request.smooth and load_arrays(folder / SCALES) is None:
            keep = Keep(folder / SMOOTHING)
            scales = smoothing_scales(
                unscaled_weights(plan, reader),
                {step.path: rounding_of(step) for step in plan.steps if step.spec},
                windows, plan.dtype, lambda n: progress(n, total), keep,
            )  # fmt: skip
            save_arrays(folder / SCALES, scales)
            keep.discard()
        if specs:
            weights = transformed_weights(plan, reader, folder)
            pace = Pace(plan, windows.size, folder)

            def report(done: int) -> None:
                pace.reach(done)
                progress(before + done, total)

            for path, codes in quantize_model(
                weights, specs, windows, plan.dtype, report, folder=folder
            ):
                arrays = (codes.packed, codes.scales, codes.biases)
                save_arrays(_code_file(folder, path), dict(zip(PARTS, arrays, strict=True)))
    with whole_file(folder / DONE) as beside:
        beside.touch()
    (folder / calibrate.STREAMS).unlink(missing_ok=True)


def layer_runs(plan: Plan) -> int:
    """How often `make_codes` runs through a layer."""
    depth = plan.source.config.num_hidden_layers
    with_codes = any(step.method == "gptq" for step in plan.steps)
    return (depth if plan.request.smooth else 0) + (2 * depth if with_codes else 0)


def kept_bytes(plan: Plan, tokens: int) -> int:
    """Most that `make_codes` has on disk at once: all codes, and what it goes on from."""
    config = plan.source.config
    codes = sum(
        step.outputs[0].size_bytes + 4 * sum(math.prod(t.shape) for t in step.outputs[1:])
        for step in plan.steps
        if step.method == "gptq"
    )
    return codes + calibrate.kept_bytes(config, tokens)


def read_codes(folder: Path, step: Step) -> tuple[mx.array, ...]:
    """The tensors of a calibrated step, tuned where they are.

    Raises:
        ResourceError: they were damaged meanwhile.
    """
    kept = load_arrays(_code_file(folder, step.path))
    if kept is None:
        raise ResourceError(
            f"{step.path}: its codes were damaged or taken away meanwhile; start again"
        )
    if (tuned := load_arrays(tuned_file(folder, step.path))) is not None:
        kept |= tuned
    weight, *others = (mx.array(kept[part]) for part in PARTS)
    return weight, *(array.astype(MLX_TYPES[step.dtype]) for array in others)


def with_tuned_norms(weights: Weights, folder: Path | None) -> Weights:
    """`weights` with the norms that were tuned; `folder` is that of the codes."""
    kept = None if folder is None else load_arrays(tuned_file(folder, NORMS))
    return weights if kept is None else _OtherVectors(weights, kept)


def tuned_file(folder: Path, name: str) -> Path:
    """Where the scales and biases of a module lie that were tuned, or the norms."""
    return folder / TUNED / f"{name}.npz"


def _code_file(folder: Path, path: str) -> Path:
    return folder / f"{path}.npz"
