"""What quantization costs in quality: this package's quantizers beside mlx-lm's, at equal bytes.

    python -m tests.benchmarks.quantizers [--bits 2 3 4 6] [--windows 48] [--dwq]

The embedded model, calibrated on conversations as it was trained on and judged on others. Every
matrix has groups of 64 with bfloat16 scales and biases, whoever quantized it; every model is judged
by the same float32 arithmetic on its dequantized weights, against the original. mlx-lm's GPTQ gets
the same windows; it has 2, 4 and 8 bits and leaves the embedding to rounding. Its DWQ, slow without
a GPU, sees them once (batches of 4, Adam at 1e-4); without `--dwq` the ratios leave it out, though
it is mlx-lm's best at 2 and 3 bits.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from apertus_mlx import layout
from apertus_mlx.config import ModelConfig
from apertus_mlx.embedded.recipe.corpus import documents
from convert.calibrate import quantize_model
from convert.layerwise import SourceWeights, head_path, hidden_states, open_weights
from convert.reading import Reader
from quant import metrics, search
from quant.affine import dequantize
from quant.spec import QuantSpec

EMBEDDED = Path(__file__).parents[2] / "apertus_mlx" / "embedded" / "model"
LENGTH = 256
GROUP_SIZE = 64
# Most that our best may have of the divergence of mlx-lm's best, by bits.
BARS = {2: 0.45, 3: 0.40, 4: 0.60, 6: 0.60}
Matrices = Mapping[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class Replaced:
    """A model with other weights in some matrices."""

    weights: SourceWeights
    matrices: Matrices

    @property
    def config(self) -> ModelConfig:
        return self.weights.config

    def matrix(self, path: str) -> np.ndarray:
        return self.matrices[path] if path in self.matrices else self.weights.matrix(path)

    def vector(self, name: str) -> np.ndarray:
        return self.weights.vector(name)


def read_windows(directory: Path, seed: int, count: int) -> np.ndarray:
    """Windows of documents from the recipe of the embedded model."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    ids: list[int] = []
    for document in documents(seed):
        for segment in document:
            ids += tokenizer.encode(segment.text, add_special_tokens=False).ids
        if len(ids) >= count * LENGTH:
            return np.array(ids[: count * LENGTH]).reshape(count, LENGTH)
    raise AssertionError


def stock_rounding(weights: SourceWeights, spec: QuantSpec) -> dict[str, np.ndarray]:
    """mlx.core.quantize of bfloat16 weights."""
    found = {}
    for matrix in layout.matrices(weights.config):
        values = mx.array(weights.matrix(matrix.path)).astype(mx.bfloat16)
        codes, scales, biases = mx.quantize(values, group_size=GROUP_SIZE, bits=spec.bits)
        found[matrix.path] = stored(codes, scales, biases, spec)
    return found


def stored(codes: mx.array, scales: mx.array, biases: mx.array, spec: QuantSpec) -> np.ndarray:
    """Float32 weights of codes whose scales and biases are stored in bfloat16."""
    rounded = [a.astype(mx.bfloat16).astype(mx.float32) for a in (scales, biases)]
    return np.array(mx.dequantize(codes, *rounded, group_size=GROUP_SIZE, bits=spec.bits))


def peer(directory: Path, quantize: Callable[[Any], Any], spec: QuantSpec) -> dict[str, np.ndarray]:
    """The matrices of a model that mlx-lm loaded in float32 and `quantize` changed."""
    from mlx_lm.utils import load_model

    model, _ = load_model(directory)
    model.set_dtype(mx.float32)
    model = quantize(model)
    return {
        path: stored(module.weight, module.scales, module.biases, spec)
        for path, module in model.named_modules()
        if hasattr(module, "scales")
    }


def stock_gptq(model: Any, windows: np.ndarray, spec: QuantSpec) -> Any:
    from mlx_lm.quant.gptq import gptq_quantize

    return gptq_quantize(model, mx.array(windows), spec.bits, GROUP_SIZE, spec.bits, GROUP_SIZE)[0]


def stock_dwq(model: Any, windows: np.ndarray, spec: QuantSpec) -> Any:
    import copy

    import mlx.nn as nn
    import mlx.optimizers as optimizers
    from mlx_lm.quant.dwq import dwq_quantize

    teacher = copy.deepcopy(model)
    nn.quantize(model, group_size=GROUP_SIZE, bits=spec.bits)
    data = [(list(map(int, window)), 0) for window in windows]

    def targets(batch: mx.array, index: int, split: str) -> mx.array:
        return teacher(batch)

    dwq_quantize(
        model, targets, optimizers.Adam(1e-4, bias_correction=True), data, data[:4], 4, LENGTH,
        seed=0, dtype=mx.float32,
    )  # fmt: skip
    return model


def methods(
    weights: SourceWeights, spec: QuantSpec, calibration: np.ndarray, dwq: bool
) -> Iterator[tuple[str, Callable[[], Matrices]]]:
    """Everybody's methods for one width, each a function that quantizes."""
    paths = [matrix.path for matrix in layout.matrices(weights.config)]

    def calibrated() -> Matrices:
        codes = quantize_model(weights, dict.fromkeys(paths, spec), calibration)
        return {path: dequantize(found) for path, found in codes}

    def searched() -> Matrices:
        return {path: dequantize(search.fit(weights.matrix(path), spec)) for path in paths}

    yield "mlx-lm rtn", lambda: stock_rounding(weights, spec)
    if spec.bits in (2, 4, 8):
        yield (
            "mlx-lm gptq",
            lambda: peer(EMBEDDED, lambda model: stock_gptq(model, calibration, spec), spec),
        )
    if dwq:
        yield (
            "mlx-lm dwq",
            lambda: peer(EMBEDDED, lambda model: stock_dwq(model, calibration, spec), spec),
        )
    yield "search", searched
    yield "gptq", calibrated


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4, 6])
    parser.add_argument("--windows", type=int, default=48)
    parser.add_argument("--dwq", action="store_true")
    arguments = parser.parse_args()
    calibration = read_windows(EMBEDDED, 5, arguments.windows)
    held_out = read_windows(EMBEDDED, 987_654_321, 24)
    last = np.full((len(held_out), 1), -1)
    following = np.concatenate([held_out[:, 1:], last], 1).reshape(-1)
    print("| bits | method | bytes | KL mean | median | p90 | top-1 | perplexity | seconds |")
    print("|---|---|---|---|---|---|---|---|---|")
    with Reader(EMBEDDED) as reader:
        weights = open_weights(EMBEDDED, reader)
        matrices = list(layout.matrices(weights.config))

        def logits(matrices: Matrices) -> np.ndarray:
            model = Replaced(weights, matrices)
            hidden = hidden_states(model, [held_out])[0]
            return hidden.reshape(-1, hidden.shape[-1]) @ model.matrix(head_path(model.config)).T

        reference = logits({})
        for bits in arguments.bits:
            spec = QuantSpec(bits, GROUP_SIZE)
            size = sum(spec.weight_bytes(m.rows, m.columns, 2) for m in matrices)
            divergences = {}
            for method, make in methods(weights, spec, calibration, arguments.dwq):
                started = time.perf_counter()
                made = make()
                seconds = time.perf_counter() - started
                found = metrics.summarise(metrics.compare(reference, logits(made), following))
                divergences[method] = found.kl_mean
                print(
                    f"| {bits} | {method} | {size:,} | {found.kl_mean:.5f} | {found.kl_median:.5f}"
                    f" | {found.kl_p90:.4f} | {found.top1_agreement:.4f} | {found.perplexity:.4f}"
                    f" | {seconds:.1f} |",
                    flush=True,
                )
            theirs = min(v for k, v in divergences.items() if k.startswith("mlx-lm"))
            ours = min(v for k, v in divergences.items() if not k.startswith("mlx-lm"))
            bar = f" (bar {BARS[bits]})" if bits in BARS else ""
            print(f"\n{bits} bits: ours is {ours / theirs:.3f} of mlx-lm's best{bar}\n", flush=True)


if __name__ == "__main__":
    main()
