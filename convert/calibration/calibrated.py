"""The calibrated part of a conversion: which text, the codes of each matrix, and the receipt.

Codes are made before anything is written, since layers depend on those before them while the output
has an order of its own. Until they are written they lie in a folder beside the output.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
from safetensors.numpy import save_file

from apertus_mlx.config import ModelConfig
from apertus_mlx.template import ChatTemplate
from apertus_mlx.tokenizer import Tokenizer
from convert.calibration.calibrate import passes, quantize_model
from convert.calibration.smoothing import rounding_of, smoothing_scales
from convert.calibration.texts import Sample, TextSet, hold_out, read_texts, sample_windows
from convert.plan import CALIBRATION_TOKENS, Plan, Step
from convert.reading import MLX_TYPES, Reader
from convert.transformed import SCALES, transformed_weights, unscaled_weights
from quant.affine import ScaleType

FOLDER = ".calibrated"
DONE = "done"
WINDOW_TOKENS = 512
WINDOWS = CALIBRATION_TOKENS // WINDOW_TOKENS
SEED = 0
# What becomes of a matrix, in the order of the tensors of its step.
PARTS = ("weight", "scales", "biases")


@dataclass(frozen=True, slots=True)
class Calibration:
    """Windows to calibrate on, and texts held out from them to judge the result by."""

    sample: Sample
    judged: TextSet


def prepare_calibration(directory: Path, config: ModelConfig, paths: Sequence[Path]) -> Calibration:
    """Read the texts, keep a part to judge by, and cut windows for the model in `directory`.

    Raises:
        ApertusError: see `read_texts` and `sample_windows`.
    """
    tokenizer = Tokenizer.load(
        directory, vocab_size=config.vocab_size, bos_token_id=config.bos_token_id
    )
    template = ChatTemplate.load(directory, tokenizer)
    seen, judged = hold_out(read_texts(paths))
    sample = sample_windows(seen, tokenizer, template, WINDOW_TOKENS, WINDOWS, SEED)
    return Calibration(sample, judged)


def make_codes(
    plan: Plan,
    source: Path,
    calibration: Calibration,
    workspace: Path,
    progress: Callable[[int, int], None],
) -> Path:
    """Find what `plan` needs texts for: scales and codes; returns the folder that holds them.

    What an interrupted run has finished is used again.

    Raises:
        RejectedError: a source value is not finite.
    """
    folder = workspace / FOLDER
    if (folder / DONE).exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    steps = {step.path: step for step in plan.steps if step.method == "gptq"}
    specs = {path: step.spec for path, step in steps.items() if step.spec is not None}
    scale_type: ScaleType = "BF16" if plan.dtype == "BF16" else "F32"
    if plan.dtype == "F16":
        scale_type = "F16"
    windows = calibration.sample.windows
    with Reader(source) as reader:
        before = plan.source.config.num_hidden_layers if plan.request.smooth else 0
        total = before + (passes(unscaled_weights(plan, reader)) if specs else 0)
        if plan.request.smooth:
            scales = smoothing_scales(
                unscaled_weights(plan, reader),
                {step.path: rounding_of(step, scale_type) for step in plan.steps if step.spec},
                windows, scale_type, lambda n: progress(n, total),
            )  # fmt: skip
            save_file(scales, folder / SCALES)
        if specs:
            weights = transformed_weights(plan, reader, folder)
            for path, codes in quantize_model(
                weights, specs, windows, scale_type, lambda n: progress(before + n, total)
            ):
                arrays = (codes.packed, codes.scales, codes.biases)
                for part, array in zip(PARTS, arrays, strict=True):
                    np.save(folder / f"{path}.{part}.npy", array)
    (folder / DONE).touch()
    return folder


def read_codes(folder: Path, step: Step, start: int, stop: int) -> tuple[mx.array, ...]:
    """Rows of the tensors of a calibrated step."""
    arrays = []
    for part, tensor in zip(PARTS, step.outputs, strict=True):
        rows = np.load(folder / f"{step.path}.{part}.npy", mmap_mode="r")[start:stop]
        array = mx.array(np.ascontiguousarray(rows))
        arrays.append(array if part == "weight" else array.astype(MLX_TYPES[tensor.dtype]))
    return tuple(arrays)


def discard_codes(workspace: Path) -> None:
    """Remove what `make_codes` left."""
    shutil.rmtree(workspace / FOLDER, ignore_errors=True)
