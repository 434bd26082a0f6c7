"""What training a student of a real size takes, beside what was planned for it.

    python -m benchmarks.distillation_memory 0.5B [--train weights] [--steps 2]

The student has random 4-bit codes in groups of 64; tokens and the teacher's answers are random as
well. Batches are those of `distill`. There is a validation before the first step and after each,
with a saved state; in the end the best weights are taken. Prints as JSON the planned bytes, the
most that the process had in memory, what it had before, MLX's own peak, and seconds, of the clock
and of processors, all of them divided by the steps.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from apertus_mlx.backend import tf32
from apertus_mlx.backend.hardware import peak_bytes
from apertus_mlx.checkpoint import layout
from apertus_mlx.checkpoint.config import ModelConfig, parse_config
from apertus_mlx.convert.distill.resources import Resources
from apertus_mlx.convert.distill.student import TRAINED, RoundedNorm, Trained, assemble, quantized
from apertus_mlx.convert.distill.teacher_cache import Batch
from apertus_mlx.convert.distill.training import Options, Training
from apertus_mlx.model.apertus import Model
from apertus_mlx.quant.spec import QuantSpec
from benchmarks.make_checkpoint import GEOMETRIES, config

SPEC, WINDOW, TOP_K = QuantSpec(4, 64), 256, 64


class RandomAnswers:
    """Batches with random tokens and answers."""

    def __init__(self, config: ModelConfig, batches: int, windows: int) -> None:
        self._config, self._batches, self._shape = config, batches, (windows, WINDOW)
        self.tokens = batches * windows * WINDOW

    def __len__(self) -> int:
        return self._batches

    def batch(self, index: int) -> Batch:
        """Batch `index`."""
        rng = np.random.default_rng(index)
        vocabulary = self._config.output_vocab_size
        tokens = rng.integers(0, vocabulary, self._shape)
        # A token each from as many equal parts of the vocabulary, so that none comes twice.
        parts = np.arange(TOP_K) * (vocabulary // TOP_K)
        likeliest = parts + rng.integers(0, vocabulary // TOP_K, (*self._shape, TOP_K))
        shares = rng.dirichlet(np.ones(TOP_K + 1), self._shape).astype(np.float32)
        return Batch(*map(mx.array, (tokens, likeliest.astype(np.uint32), shares)))


def make_student(config: ModelConfig, trained: Trained) -> Model:
    """A student with random codes, whose weights have a standard deviation of about 0.02."""
    rng = np.random.default_rng(0)
    modules: dict[str, nn.Module] = {}
    arrays: dict[str, mx.array] = {}
    for matrix in layout.matrices(config):
        words = (matrix.rows, matrix.columns * SPEC.bits // 32)
        codes = mx.array(rng.integers(0, 1 << 32, words, np.uint32))
        groups = (matrix.rows, matrix.columns // SPEC.group_size)
        scales, biases = mx.full(groups, 0.004), mx.full(groups, -0.03)
        modules[matrix.path] = quantized(matrix, (codes, scales, biases), SPEC, mx.bfloat16)
    types = {name: mx.bfloat16 for name, _ in layout.vectors(config)}
    for name, shape in layout.vectors(config):
        if name.endswith("norm.weight"):
            norm = RoundedNorm(mx.ones(shape), config.rms_norm_eps, mx.bfloat16)
            modules[name.removesuffix(".weight")] = norm
        else:
            arrays[name] = mx.full(shape, -1e-6 if name.endswith("eps") else 0.5)
    return assemble(config, modules, arrays, types, trained)


def measure(size: str, trained: Trained, steps: int) -> dict[str, Any]:
    """Train for some steps; planned and measured bytes."""
    tf32.switch_off()
    parsed = parse_config(config(size))
    resources = Resources(parsed, trained, WINDOW)
    before = peak_bytes(gpu=False)
    student = make_student(parsed, trained)
    batches, held_out = (
        RandomAnswers(parsed, count, resources.batch_windows) for count in (steps, 1)
    )
    answers: Any = batches, held_out
    with tempfile.TemporaryDirectory() as folder:
        options = Options(trained, top_k=TOP_K)
        run = Training(student, *answers, options, Path(folder), resources.by_layers)
        began, started = time.process_time(), time.perf_counter()
        run.run(lambda *_: None)
        mx.eval(student.parameters())
    return {
        "size": size,
        "trained": trained,
        "by_layers": resources.by_layers,
        "batch_tokens": resources.batch_windows * WINDOW,
        "planned_bytes": resources.memory_bytes,
        "peak_bytes": peak_bytes(gpu=False),
        "before_bytes": before,
        "mlx_peak_bytes": mx.get_peak_memory(),
        "s_per_step": round((time.perf_counter() - started) / steps, 2),
        "cpu_s_per_step": round((time.process_time() - began) / steps, 1),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("size", choices=GEOMETRIES)
    parser.add_argument("--train", choices=TRAINED, default="weights")
    parser.add_argument("--steps", type=int, default=2)
    given = parser.parse_args()
    print(json.dumps(measure(given.size, given.train, given.steps)))


if __name__ == "__main__":
    main()
