"""Everybody's quantizers by one name each, and one of them measured in this process.

`quantizers` starts a process for each. Calibration, comparison and arithmetic are the same for all:
the same windows, float32 products with the weights as they come back from storage, and bfloat16
scales and biases, whoever made them.
"""

from __future__ import annotations

import copy
import json
import re
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from apertus_mlx.checkpoint import layout
from apertus_mlx.checkpoint.config import ModelConfig, read_config
from apertus_mlx.checkpoint.tensors import open_checkpoint
from apertus_mlx.convert.calibration.allocation import allocate_bits
from apertus_mlx.convert.calibration.calibrated import Calibration, make_codes, with_tuned_norms
from apertus_mlx.convert.calibration.held_out_comparison import Planned
from apertus_mlx.convert.calibration.tuning import tune, with_own_text
from apertus_mlx.convert.evaluation.layerwise import Weights, head_path, hidden_states, open_weights
from apertus_mlx.convert.evaluation.texts import (
    Document,
    Sample,
    TextSet,
    hold_out,
    open_text,
    read_texts,
    sample_windows,
)
from apertus_mlx.convert.plan.planning import make_plan
from apertus_mlx.convert.plan.policy import Method, Request, Target
from apertus_mlx.convert.sources.reading import Reader
from apertus_mlx.convert.sources.recognise import recognise
from apertus_mlx.convert.transforms.weights import transformed_weights
from apertus_mlx.quant import metrics
from apertus_mlx.quant.spec import QuantSpec
from apertus_mlx.text.template import Message
from benchmarks import auto_round_export
from benchmarks.quantizers import AUTO_ROUND, STOCK, Case
from recipes.demo.corpus import documents
from tests.trained_model import recipe_windows

GROUP_SIZE = 64
# Up to 4 bits and above; what was best for it, of 1e-4, 3e-5 and 1e-5 on the trained model.
DWQ_RATES = (1e-4, 1e-5)
CALIBRATION_SEED = 5
# Documents that an allocation is checked on before it is taken.
CHECK_SEED, CHECK_DOCUMENTS = 6, 200
# Nothing was ever tuned on these documents; a change that is made because of them needs others.
JUDGE_SEED, JUDGE_TOKENS = 41_017_633, 8192
# Of a folder of texts: it has more languages than the recipe.
JUDGE_TEXT_TOKENS = 32_768
# Tokens whose logits stand in memory at once.
BLOCK_TOKENS = 2048
Matrices = Mapping[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class Replaced:
    """A model with other weights; `matrices` by path, `vectors` by name."""

    weights: Weights
    matrices: Matrices
    vectors: Matrices

    @property
    def config(self) -> ModelConfig:
        return self.weights.config

    def matrix(self, path: str) -> np.ndarray:
        return self.matrices[path] if path in self.matrices else self.weights.matrix(path)

    def vector(self, name: str) -> np.ndarray:
        return self.vectors[name] if name in self.vectors else self.weights.vector(name)


@dataclass(frozen=True, slots=True)
class Made:
    """What a method leaves: weights, and what their tensors take.

    Attributes:
        cost: what was measured in another process, where the method ran.
    """

    matrices: Matrices
    vectors: Matrices
    size_bytes: int
    cost: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Material:
    """Windows `[count, length]` to calibrate on, texts to check on, and windows to judge by."""

    calibration: Sample
    checked: TextSet
    judged: np.ndarray


def material(case: Case) -> Material:
    """Of the embedded model's recipe, or of the folders `calibration` and `judged` in a text."""
    seed = JUDGE_SEED if case.judge_seed is None else case.judge_seed
    if case.text is None:
        windows = recipe_windows(CALIBRATION_SEED, case.windows, case.length)
        return Material(
            Sample(windows, "recipe", "", CALIBRATION_SEED),
            TextSet("recipe", "", tuple(islice(recipe_texts(CHECK_SEED), CHECK_DOCUMENTS))),
            recipe_windows(seed, JUDGE_TOKENS // case.length, case.length),
        )
    seen, checked = hold_out(read_texts([case.text / "calibration"]))
    judged = read_texts([case.text / "judged"])
    tokenizer = open_text(case.directory)
    count = JUDGE_TEXT_TOKENS // case.length
    return Material(
        sample_windows(seen, *tokenizer, case.length, case.windows, CALIBRATION_SEED),
        checked,
        sample_windows(judged, *tokenizer, case.length, count, seed).windows,
    )


def measure(case: Case) -> dict[str, Any]:
    """Quantize in this process and judge; see `quantizers` for the keys."""
    given = material(case)
    make = _maker(case, given)
    before_bytes = _peak_bytes()
    wall, cpu = time.perf_counter(), time.process_time()
    made = make()
    wall_s, cpu_s = time.perf_counter() - wall, time.process_time() - cpu
    grown_bytes = _peak_bytes() - before_bytes
    with Reader(case.directory) as reader:
        weights = open_weights(case.directory, reader)
        divergence = judge(weights, Replaced(weights, made.matrices, made.vectors), given.judged)
    return {
        "bytes": made.size_bytes,
        **asdict(divergence),
        "wall_s": round(wall_s, 2),
        "cpu_s": round(cpu_s, 2),
        "peak_growth_bytes": grown_bytes,
        "imports_bytes": before_bytes,
        **made.cost,
    }


def judge(reference: Weights, model: Weights, windows: np.ndarray) -> metrics.Divergence:
    """Compare two models on `windows`."""
    last = np.full((len(windows), 1), -1)
    following = np.concatenate([windows[:, 1:], last], 1)
    rows = max(BLOCK_TOKENS // windows.shape[1], 1)
    parts = [slice(start, start + rows) for start in range(0, len(windows), rows)]
    return metrics.summarise(metrics.join([
        metrics.compare(
            logits(reference, windows[part]), logits(model, windows[part]),
            following[part].reshape(-1),
        )
        for part in parts
    ]))  # fmt: skip


def logits(weights: Weights, windows: np.ndarray) -> np.ndarray:
    """Float32 logits `[tokens, vocabulary]`."""
    hidden = hidden_states(weights, [windows])[0]
    return hidden.reshape(-1, hidden.shape[-1]) @ weights.matrix(head_path(weights.config)).T


def _maker(case: Case, given: Material) -> Callable[[], Made]:
    """The method, with everything imported that it needs."""
    spec = QuantSpec(case.bits, GROUP_SIZE)
    size_bytes = uniform_bytes(case.directory, spec)
    calibration = given.calibration.windows
    if case.method == AUTO_ROUND:
        assert case.environments is not None
        python = auto_round_export.environment(case.environments)
        return lambda: auto_round(case.directory, calibration, spec, python, size_bytes)
    if case.method not in STOCK:
        request = _request(case.method, spec, size_bytes)
        return lambda: ours(case.directory, request, given)
    import mlx_lm.quant.dwq
    import mlx_lm.quant.gptq
    import mlx_lm.utils  # noqa: F401

    quantize: dict[str, Callable[[Any], Any]] = {
        "mlx-lm rtn": lambda model: stock_rtn(model, spec),
        "mlx-lm gptq": lambda model: stock_gptq(model, calibration, spec),
        "mlx-lm dwq": lambda model: stock_dwq(model, calibration, spec),
    }
    chosen = quantize[case.method]
    return lambda: Made(stock(case.directory, chosen, spec), {}, size_bytes)


def _request(name: str, spec: QuantSpec, size_bytes: int) -> Request:
    """The request that a name such as `gptq + smooth + allocation` stands for."""
    base, *extras = name.split(" + ")
    method: Method = "search" if base == "search" else "gptq"
    allocated = "allocation" in extras
    return Request(
        None if allocated else spec,
        target=Target(size_bytes=size_bytes) if allocated else None,
        method=method,
        smooth="smooth" in extras,
        rotate="rotate" in extras,
        tune="tune" in extras,
    )


def uniform_bytes(directory: Path, spec: QuantSpec) -> int:
    """What all tensors take when each matrix has the format `spec`."""
    return make_plan(_source(directory), Request(spec)).weight_bytes


def ours(directory: Path, request: Request, given: Material) -> Made:
    """What `convert` would write for `request`, calibrated on what is given."""
    source = _source(directory)
    calibration = Calibration(given.calibration, given.checked)
    with tempfile.TemporaryDirectory() as place, Reader(directory) as reader:
        measured, codes = (Path(place) / name for name in ("measured", "codes"))
        measured.mkdir()
        codes.mkdir()
        if request.target is not None:
            request = allocate_bits(source, request, directory, calibration, measured).request
        plan = make_plan(source, request)
        if plan.calibrates:
            texts = calibration
            if request.tune:
                texts = with_own_text(plan, directory, calibration, codes, lambda *_: None)
            make_codes(plan, directory, texts, codes, lambda *_: None)
        if request.tune:
            tune(plan, directory, calibration, codes, lambda *_: None)
        weights = with_tuned_norms(transformed_weights(plan, reader, codes), codes)
        planned = Planned(weights, plan, codes)
        return Made(
            {matrix.path: planned.matrix(matrix.path) for matrix in layout.matrices(source.config)},
            {name: planned.vector(name) for name, _ in layout.vectors(source.config)},
            plan.weight_bytes,
        )


def stock(
    directory: Path, quantize: Callable[[Any], Any], spec: QuantSpec
) -> dict[str, np.ndarray]:
    """The matrices of a model that mlx-lm loaded in float32 and `quantize` changed."""
    from mlx_lm.utils import load_model

    model, _ = load_model(directory)
    model.set_dtype(mx.float32)
    model = quantize(model)
    return {
        path: _stored(module.weight, module.scales, module.biases, spec)
        for path, module in model.named_modules()
        if hasattr(module, "scales")
    }


def stock_rtn(model: Any, spec: QuantSpec) -> Any:
    """What `mlx_lm.convert -q` does: mlx.core.quantize of bfloat16 weights."""
    model.set_dtype(mx.bfloat16)
    nn.quantize(model, group_size=spec.group_size, bits=spec.bits)
    return model


def stock_gptq(model: Any, windows: np.ndarray, spec: QuantSpec) -> Any:
    """mlx-lm's; it leaves the embedding to rounding."""
    from mlx_lm.quant.gptq import gptq_quantize

    group_size = spec.group_size
    return gptq_quantize(model, mx.array(windows), spec.bits, group_size, spec.bits, group_size)[0]


def stock_dwq(model: Any, windows: np.ndarray, spec: QuantSpec) -> Any:
    """mlx-lm's, from its own rounding."""
    import mlx.optimizers as optimizers
    from mlx_lm.quant.dwq import dwq_quantize

    teacher = copy.deepcopy(model)
    nn.quantize(model, group_size=spec.group_size, bits=spec.bits)
    data = [(list(map(int, window)), 0) for window in windows]
    dwq_quantize(
        model, lambda batch, index, split: teacher(batch),
        optimizers.Adam(DWQ_RATES[spec.bits > 4], bias_correction=True), data, data[:4], 4,
        windows.shape[1], seed=0, dtype=mx.float32,
    )  # fmt: skip
    return model


def auto_round(
    directory: Path, windows: np.ndarray, spec: QuantSpec, python: Path, size_bytes: int
) -> Made:
    """AutoRound's export for MLX, from a process of its own; it leaves the embedding to rounding.

    Raises:
        SystemExit: it cannot make it, or makes another format.
    """

    def rounded(model: Any) -> Any:
        for name, module in model.named_modules():
            if hasattr(module, "scales") and (module.bits, module.group_size) != (
                spec.bits, spec.group_size
            ):  # fmt: skip
                raise SystemExit(f"{name}: AutoRound chose another format than {spec}")
        nn.quantize(model, group_size=spec.group_size, bits=spec.bits)
        return model

    with tempfile.TemporaryDirectory() as place:
        folder, cost = auto_round_export.run(
            python, directory, windows, spec.bits, spec.group_size, Path(place)
        )
        return Made(stock(folder, rounded, spec), {}, size_bytes, cost)


def recipe_texts(seed: int) -> Any:
    """Documents of the embedded model's recipe as `calibration_text` would read them."""
    turn = re.compile(
        r"<\|(system|user|assistant)_start\|>(.*?)<\|(?:system|user|assistant)_end\|>", re.DOTALL
    )
    for document in documents(seed):
        text = "".join(segment.text for segment in document)
        if "<|" not in text:
            yield Document("und", text.removeprefix("<s>").removesuffix("</s>"))
        elif "<|inner_prefix|>" not in text:
            messages = [Message(role=role, content=said) for role, said in turn.findall(text)]
            yield Document("und", tuple(m for m in messages if m["content"]))


def _source(directory: Path) -> Any:
    return recognise(read_config(directory), open_checkpoint(directory).tensors, str(directory))


def _stored(codes: mx.array, scales: mx.array, biases: mx.array, spec: QuantSpec) -> np.ndarray:
    """Float32 weights of codes whose scales and biases are stored in bfloat16."""
    rounded = [a.astype(mx.bfloat16).astype(mx.float32) for a in (scales, biases)]
    return np.array(mx.dequantize(codes, *rounded, group_size=spec.group_size, bits=spec.bits))


def _peak_bytes() -> int:
    # Linux counts kilobytes, macOS bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def main() -> None:
    """Measure the case that is described in JSON, and print what came out as JSON."""
    values = json.loads(sys.argv[1])
    paths = ("directory", "text", "environments")
    places = {key: Path(values[key]) for key in paths if values[key] is not None}
    case = Case(**{**values, **places})
    # mlx-lm talks on stdout while it works.
    out, sys.stdout = sys.stdout, sys.stderr
    print(json.dumps(measure(case)), file=out)


if __name__ == "__main__":
    main()
