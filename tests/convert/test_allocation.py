"""Bits where they matter: sensitivities, the choice of formats, and `convert --target-*`."""

from __future__ import annotations

import itertools
import json
import random
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from apertus_mlx.backend.mlx import load_model
from apertus_mlx.checkpoint import layout
from apertus_mlx.checkpoint.config import ModelConfig
from apertus_mlx.cli.app import app
from apertus_mlx.convert.calibration import allocation, gradients, held_out_comparison
from apertus_mlx.convert.calibration.allocation import Unit, allocate_bits, choose_formats
from apertus_mlx.convert.calibration.calibrated import Calibration, prepare_calibration
from apertus_mlx.convert.calibration.gradients import backward, trace_layers
from apertus_mlx.convert.calibration.sensitivity import Divergences, Prediction, predict_divergences
from apertus_mlx.convert.check.verify import verify
from apertus_mlx.convert.evaluation.layerwise import (
    Layer,
    SourceWeights,
    Weights,
    head_path,
    hidden_states,
    open_weights,
)
from apertus_mlx.convert.evaluation.texts import Document, Sample, TextSet
from apertus_mlx.convert.job import convert, prepare
from apertus_mlx.convert.plan.planning import make_plan
from apertus_mlx.convert.plan.policy import Request, Rule, Target
from apertus_mlx.convert.report import default_name
from apertus_mlx.convert.sources.reading import Reader
from apertus_mlx.convert.write.manifest import MANIFEST
from apertus_mlx.errors import ApertusError, UsageError
from apertus_mlx.hub.demo import model_dir
from apertus_mlx.quant import search
from apertus_mlx.quant.affine import dequantize
from apertus_mlx.quant.allocate import Choice, allocate
from apertus_mlx.quant.arrays import Float32
from apertus_mlx.quant.metrics import compare, summarise
from apertus_mlx.quant.spec import AFFINE_BITS, QuantSpec
from recipes.demo.corpus import documents
from tests.builders import config_4x, write_checkpoint
from tests.trained_model import recipe_windows

WIDTHS = [QuantSpec(bits, 64) for bits in AFFINE_BITS]
LENGTH = 256
FORMATS = [*WIDTHS, *(QuantSpec(bits, 128) for bits in AFFINE_BITS)]


def brute_force(parts: list[list[Choice]], most: int, least: int) -> float:
    """The least divergence of all combinations within the limits, or of the largest below them."""
    sums = [
        (sum(choice.size_bytes for choice in each), sum(choice.divergence for choice in each))
        for each in itertools.product(*parts)
    ]
    nearest = max(size for size, _ in sums if size <= most)
    return min(divergence for size, divergence in sums if min(least, nearest) <= size <= most)


@pytest.mark.parametrize("step", [1, 4096])
def test_allocation_is_the_best_of_all_combinations(step: int) -> None:
    draw = random.Random(step)
    for _ in range(100):
        parts = [
            [Choice(step * draw.randint(1, 40), draw.random()) for _ in range(draw.randint(1, 5))]
            for _ in range(draw.randint(1, 5))
        ]
        smallest = sum(min(choice.size_bytes for choice in choices) for choices in parts)
        most = smallest + draw.randint(0, 80 * step)
        least = draw.choice([0, int(0.9 * most)])
        chosen = [
            choices[i] for choices, i in zip(parts, allocate(parts, most, least), strict=True)
        ]
        assert sum(choice.size_bytes for choice in chosen) <= most
        assert sum(choice.divergence for choice in chosen) == pytest.approx(
            brute_force(parts, most, least)
        )


def test_allocation_of_sizes_without_a_common_divisor() -> None:
    draw = random.Random(0)
    for _ in range(20):
        parts = [
            [Choice(draw.randint(10**8, 10**9), draw.random()) for _ in range(4)] for _ in range(5)
        ]
        most = sum(max(choice.size_bytes for choice in choices) for choices in parts) * 3 // 4
        chosen = [choices[i] for choices, i in zip(parts, allocate(parts, most), strict=True)]
        assert sum(choice.size_bytes for choice in chosen) <= most
        # At most a step per part is lost to rounding.
        assert sum(c.divergence for c in chosen) <= brute_force(parts, int(most * 0.999), 0) + 1e-9


def test_no_size_is_above_its_target_and_none_needlessly_below() -> None:
    """Random units beside all combinations, at targets from the smallest to above the largest."""
    draw = random.Random(7)
    for _ in range(150):
        units, divergences = [], {}
        for number in range(draw.randint(1, 4)):
            paths = tuple(f"{number}.{part}" for part in range(draw.randint(1, 2)))
            sizes = {spec: draw.randint(1, 400) for spec in draw.sample(FORMATS, 4)}
            units.append(Unit(paths, sizes))
            divergences |= {path: {spec: draw.random() for spec in sizes} for path in paths}
        ends = [sum(end(unit.sizes_bytes.values()) for unit in units) for end in (min, max)]
        target = draw.randint(ends[0], int(1.01 * ends[1]))
        formats = choose_formats(units, divergences, target)
        size = sum(unit.sizes_bytes[formats[unit.paths[0]]] for unit in units)
        nearest = max(
            total
            for each in itertools.product(*(unit.sizes_bytes.values() for unit in units))
            if (total := sum(each)) <= target
        )
        assert min(0.99 * target, nearest) <= size <= target
    with pytest.raises(ValueError, match="smallest"):
        choose_formats(units, divergences, ends[0] - 1)


@pytest.mark.parametrize(("target_bytes", "fits"), [(999, False), (1000, True), (1005, True)])
def test_a_uniform_width_above_the_target_is_no_rival(target_bytes: int, fits: bool) -> None:
    spec = QuantSpec(4, 64)
    plans: Any = {spec: SimpleNamespace(weight_bytes=1000, steps=())}
    units = [Unit(("a",), {spec: 1000})]
    rival = allocation._uniform_rival(plans, units, {"a": {spec: 0.1}}, target_bytes)
    assert (rival == spec) is fits


def test_what_cannot_be_allocated() -> None:
    with pytest.raises(ValueError, match="smallest"):
        allocate([[Choice(10, 0.0)], [Choice(5, 0.0), Choice(7, 0.0)]], 14)
    with pytest.raises(ValueError, match="finite"):
        allocate([[Choice(10, float("nan"))]], 14)


def test_gradients_are_those_of_mlx_lm(tmp_path: Path) -> None:
    """A layer backwards, through another implementation of the layer."""
    utils = pytest.importorskip("mlx_lm.utils")
    folder = write_checkpoint(tmp_path / "model", config_4x())
    theirs, _ = utils.load_model(folder)
    block = theirs.model.layers[1]
    draw = np.random.default_rng(0)
    residual, after = (mx.array(draw.standard_normal((2, 7, 64)), mx.float32) for _ in range(2))
    names = [f"self_attn.{name}_proj" for name in "qkvo"] + ["mlp.up_proj", "mlp.down_proj"]
    modules = {name: getattr(getattr(block, name[:-7].split(".")[0]), name.split(".")[1])
               for name in names}  # fmt: skip

    def run(x: mx.array, *weights: mx.array) -> mx.array:
        for module, weight in zip(modules.values(), weights, strict=True):
            module.weight = weight
        return block(x, mask="causal", cache=None)

    inputs = [residual, *(module.weight for module in modules.values())]
    outputs, wanted = mx.vjp(run, inputs, [after])
    with Reader(folder) as reader:
        layer = Layer(open_weights(folder, reader), 1)
        assert np.allclose(layer(residual), outputs[0], atol=1e-4)
        before, traces = backward(layer, residual, after)
    assert np.allclose(before, wanted[0], atol=1e-4)
    found = {path: g.T @ trace.inputs for trace in traces for path, g in trace.gradients.items()}
    for name, expected in zip(names, wanted[1:], strict=True):
        assert np.allclose(found[f"{layer.path}.{name}"], expected, atol=2e-4), name


@dataclass(frozen=True)
class Rounded:
    """A model with other weights in some matrices."""

    weights: SourceWeights
    matrices: dict[str, Float32]

    @property
    def config(self) -> ModelConfig:
        return self.weights.config

    def matrix(self, path: str) -> Float32:
        return self.matrices[path] if path in self.matrices else self.weights.matrix(path)

    def vector(self, name: str) -> Float32:
        return self.weights.vector(name)


@dataclass(frozen=True)
class Embedded:
    """The embedded model with what is predicted for it."""

    weights: SourceWeights
    divergences: Divergences
    units: list[Unit]
    tokens: np.ndarray
    logits: np.ndarray

    def divergence(self, formats: dict[str, QuantSpec]) -> float:
        """Measured on windows that nothing else sees."""
        matrices = {
            path: dequantize(search.fit(self.weights.matrix(path), spec))
            for path, spec in formats.items()
        }
        found = logits(Rounded(self.weights, matrices), self.tokens)
        return summarise(compare(self.logits, found, np.full(len(found), -1))).kl_mean


def logits(weights: Weights, tokens: np.ndarray) -> np.ndarray:
    hidden = hidden_states(weights, [tokens])[0]
    rows = hidden.reshape(-1, hidden.shape[-1])
    return rows @ weights.matrix(head_path(weights.config)).T


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Embedded]:
    with Reader(model_dir()) as reader:
        weights = open_weights(model_dir(), reader)
        matrices = list(layout.matrices(weights.config))
        roundings = {
            spec: lambda weight, _, spec=spec: dequantize(search.fit(weight, spec))
            for spec in FORMATS
        }
        divergences = predict_divergences(
            weights, {matrix.path: roundings for matrix in matrices},
            recipe_windows(5, 8, LENGTH), tmp_path_factory.mktemp("measured"),
        ).final  # fmt: skip
        units = [
            Unit((m.path,), {spec: spec.weight_bytes(m.rows, m.columns, 2) for spec in FORMATS})
            for m in matrices
        ]
        tokens = recipe_windows(424_242, 4, LENGTH)
        yield Embedded(weights, divergences, units, tokens, logits(weights, tokens))


@pytest.mark.nightly
def test_sensitivity_is_what_is_measured(embedded: Embedded) -> None:
    first, last = layout.layer(0), layout.layer(3)
    paths = [f"{first}.self_attn.v_proj", f"{first}.self_attn.o_proj", f"{first}.mlp.up_proj",
             f"{layout.layer(1)}.self_attn.q_proj", f"{layout.layer(2)}.mlp.down_proj",
             f"{last}.mlp.up_proj", f"{last}.mlp.down_proj", layout.EMBEDDING]  # fmt: skip
    cases = [(path, WIDTHS[number % 3]) for number, path in enumerate(paths)]
    measured = np.array([embedded.divergence({path: spec}) for path, spec in cases])
    predicted = np.array([embedded.divergences[path][spec] for path, spec in cases])
    ranks = [values.argsort().argsort() for values in (measured, predicted)]
    assert np.corrcoef(*ranks)[0, 1] > 0.9
    ratios = predicted / measured
    assert ratios.min() > 0.4
    assert ratios.max() < 2.5
    assert 0.7 < np.median(ratios) < 1.5


@pytest.mark.nightly
def test_each_bit_quarters_the_divergence(embedded: Embedded) -> None:
    for divergences in embedded.divergences.values():
        assert 2.5 < divergences[QuantSpec(3, 64)] / divergences[QuantSpec(4, 64)] < 10
        assert 2.5 < divergences[QuantSpec(4, 64)] / divergences[QuantSpec(5, 64)] < 7


@pytest.mark.nightly
def test_target_is_met(embedded: Embedded) -> None:
    least = sum(min(unit.sizes_bytes.values()) for unit in embedded.units)
    most = sum(max(unit.sizes_bytes.values()) for unit in embedded.units)
    for target in np.linspace(least, most, 40).astype(int):
        formats = choose_formats(embedded.units, embedded.divergences, int(target))
        size = sum(unit.sizes_bytes[formats[unit.paths[0]]] for unit in embedded.units)
        assert 0.99 * target <= size <= target


@pytest.mark.nightly
@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_allocation_is_better_than_a_uniform_width(embedded: Embedded, bits: int) -> None:
    uniform = QuantSpec(bits, 64)
    size = sum(unit.sizes_bytes[uniform] for unit in embedded.units)
    formats = choose_formats(embedded.units, embedded.divergences, size)
    everywhere = dict.fromkeys(formats, uniform)
    assert embedded.divergence(formats) < 0.85 * embedded.divergence(everywhere)


def recipe_texts(seed: int, count: int) -> TextSet:
    """Documents that the embedded model knows."""
    found = itertools.islice(documents(seed), count)
    texts = ["".join(segment.text for segment in document) for document in found]
    parts = tuple(Document("en", text) for text in texts)
    return TextSet(f"recipe {seed}", str(seed), parts, held_out=True)


@pytest.mark.nightly
def test_a_worse_allocation_gives_way(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Predictions turned upside down: the uniform width of the same size is taken, and said so."""

    def misled(*arguments: Any) -> Prediction:
        paths = arguments[1]
        found = {path: {spec: -1e3 * path.count("layers.3") * spec.bits for spec in formats}
                for path, formats in paths.items()}  # fmt: skip
        return Prediction(found, found)

    monkeypatch.setattr(allocation, "predict_divergences", misled)
    monkeypatch.setattr(held_out_comparison, "WINDOWS", 2)
    calibration = Calibration(
        Sample(recipe_windows(5, 2, LENGTH), "recipe", "5", 0), recipe_texts(6, 100)
    )
    with Reader(model_dir()) as reader:
        source = open_weights(model_dir(), reader).source
    # A little above the uniform width, whose norms count.
    request = Request(target=Target(3.52), method="search")
    found = allocate_bits(source, request, model_dir(), calibration, tmp_path)
    assert {rule.spec for rule in found.request.rules} == {QuantSpec(3, 64)}
    assert "that uniform width is taken" in found.note
    judged = found.record["held_out_kl"]
    assert judged["uniform"] < judged["allocated"]
    assert 0.99 * 3.52 <= found.record["reached_bits_per_weight"] <= 3.52


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "en.txt"
    lines = [f"Line {n} has {n * n} birds, and the sea is calm today." for n in range(48)]
    path.write_text("\n\n".join(lines))
    return path


def small(folder: Path, **changes: object) -> Path:
    config = config_4x(hidden_size=128, intermediate_size=256, **changes)
    return write_checkpoint(folder, config, dtype=mx.bfloat16)


@pytest.mark.parametrize(
    ("method", "tied"),
    [
        ("rtn", False),
        pytest.param("search", True, marks=pytest.mark.nightly),
        pytest.param("gptq", False, marks=pytest.mark.nightly),
    ],
)
def test_convert_to_a_target(tmp_path: Path, texts: Path, method: str, tied: bool) -> None:
    utils = pytest.importorskip("mlx_lm.utils")
    source = small(tmp_path / "source", tie_word_embeddings=tied)
    rules = (Rule("*.1.mlp.down_proj", QuantSpec(8, 32), "--set"),)
    request = Request(rules=rules, target=Target(4.1), method=method)
    target = tmp_path / "out"
    job = prepare(source, request, "source", calibration_texts=[texts], target=target)
    assert default_name("source", request) == "source-MLX-4.1bpw"
    folder = convert(job, target)
    assert not verify(folder).errors
    manifest = json.loads((folder / MANIFEST).read_text())
    # Norms and xIELU's parameters count.
    stored = sum(array.nbytes for array in mx.load(str(folder / "model.safetensors")).values())
    assert stored == manifest["weight_bytes"] == manifest["allocation"]["reached_bytes"]
    assert 0.99 * 4.1 <= 8 * stored / manifest["parameters"] <= 4.1
    assert manifest["quality"]["overall"]["kl_mean"] > 0
    assert any(manifest["allocation"]["target"] in note for note in manifest["notes"])
    specs = job.plan.specs
    assert specs[f"{layout.layer(1)}.mlp.down_proj"] == QuantSpec(8, 32)
    assert f"{layout.layer(1)}.mlp.down_proj" not in manifest["allocation"]["modules"]
    assert (layout.HEAD in specs) != tied
    for index in range(2):
        attention = f"{layout.layer(index)}.self_attn"
        assert len({specs[f"{attention}.{name}_proj"] for name in "qkv"}) == 1
    theirs, _ = utils.load_model(folder)
    theirs.set_dtype(mx.float32)
    ids = mx.array([[1, 100, 200, 300]])
    expected = np.array(load_model(folder, "float32")(ids))
    assert np.allclose(np.array(theirs(ids)), expected, atol=1e-4 * np.abs(expected).max())


def test_size_from_the_command_line(
    tmp_path: Path, texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = small(tmp_path / "source")
    command = ["convert", str(source), str(tmp_path / "out"), "--target-size", "150KiB",
               "--calibration", str(texts), "--group-size", "64"]  # fmt: skip
    app([*command, "--plan", "--json"], standalone_mode=False)
    planned = json.loads(capsys.readouterr().out)
    assert 0.99 * 150 * 1024 <= planned["output_bytes"] <= 150 * 1024
    app(command, standalone_mode=False)
    stored = mx.load(str(tmp_path / "out" / "model.safetensors"))
    assert sum(array.nbytes for array in stored.values()) == planned["output_bytes"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    formats = [config["quantization"], *config["quantization"].values()]
    sizes = {entry["group_size"] for entry in formats if isinstance(entry, dict)}
    assert sizes == {64}


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small(tmp_path_factory.mktemp("one-layer") / "source", num_hidden_layers=1)


@pytest.mark.parametrize("share", [0.0, 1e6], ids=["calibrated", "rounded"])
def test_progress_of_comparing_sizes_never_begins_again(
    one_layer: Path, texts: Path, tmp_path: Path, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether rounded codes say enough or calibrated ones have to be compared as well."""
    monkeypatch.setattr(allocation, "_clearly", lambda *_: share)
    monkeypatch.setattr(held_out_comparison, "WINDOW_TOKENS", 64)
    monkeypatch.setattr(held_out_comparison, "is_sure", lambda _: False)
    told: list[tuple[int, int]] = []

    def tell(stage: str, done: int, total: int) -> None:
        if stage == "comparing sizes":
            told.append((done, total))

    calibration = prepare_calibration(one_layer, [texts])
    with Reader(one_layer) as reader:
        source = open_weights(one_layer, reader).source
    request = Request(target=Target(4.1, group_size=64), method="gptq")
    found = allocate_bits(source, request, one_layer, calibration, tmp_path, tell)
    assert found.record["held_out_codes"] == ("rounded" if share else "final")
    assert told == sorted(told) and told[-1] == (told[0][1],) * 2
    assert len({total for _, total in told}) == 1
    # To the end by no leap, where both are compared.
    steps = [after - before for (before, _), (after, _) in pairwise(told)]
    assert (max(steps) <= 4) == (share == 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target-bpw", "2"], "out of reach; this model takes from 2.* to 8"),
        (["--target-bpw", "9"], "out of reach"),
        (["--target-size", "1kB"], "out of reach"),
        (["--target-size", "1TB"], "out of reach"),
        (["--target-bpw", "nan"], "expected a number"),
        (["--target-bpw", "-3"], "expected a number"),
        (["--target-bpw", "3,2"], "expected a number"),
        (["--target-bpw", "1e1"], "expected a number"),
        (["--target-size", "3 parsecs"], "expected a size"),
        (["--target-size", "0MB"], "expected a size"),
        (["--target-bpw", "3", "--target-size", "1MB"], "one decides the other"),
        (["--target-bpw", "3", "--bits", "4"], "leave out --bits"),
        (["--target-bpw", "3", "--mode", "mxfp4"], "leave out --bits"),
        (["--target-bpw", "3", "--recipe", "x.toml"], "leave out --bits"),
        (["--target-bpw", "3", "--calibration", "missing.txt"], "no such file"),
    ],
)
def test_targets_that_make_no_sense(
    one_layer: Path, texts: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    if "--calibration" not in options:
        options = [*options, "--calibration", str(texts)]
    with pytest.raises(ApertusError, match=message):
        app(["convert", str(one_layer), str(tmp_path / "out"), *options], standalone_mode=False)
    assert not (tmp_path / "out").exists()


def test_a_target_needs_the_weights() -> None:
    with Reader(model_dir()) as reader:
        source = open_weights(model_dir(), reader).source
    with pytest.raises(UsageError, match="measured on the weights"):
        make_plan(source, Request(target=Target(3.2)))


def test_streams_of_the_whole_model(tmp_path: Path) -> None:
    """What is handed to the head, and its normalizer, are those of the runtime."""
    folder = write_checkpoint(tmp_path / "model", config_4x())
    windows = np.random.default_rng(0).integers(0, 384, (2, 9))
    with Reader(folder) as reader:
        seen: list[int] = []
        ends = trace_layers(
            open_weights(folder, reader), windows, 0, lambda traces: None, seen.append, tmp_path
        )
    assert seen == [1, 2, 3, 4]
    expected = np.array(load_model(folder, "float32")(mx.array(windows))).reshape(18, -1)
    assert np.allclose(ends.log_total, np.log(np.exp(expected).sum(-1)), atol=1e-4)


def test_traces_are_let_go_before_the_next_layer_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are of all tokens, and a layer is as large."""
    folder = write_checkpoint(tmp_path / "model", config_4x())
    windows = np.random.default_rng(0).integers(0, 384, (2, 9))
    seen: list[weakref.ref[np.ndarray]] = []
    alive: list[int] = []

    class Watched(gradients.Layer):
        def __init__(self, *given: Any) -> None:
            alive.append(sum(reference() is not None for reference in seen))
            super().__init__(*given)

    def use(traces: list[gradients.Trace]) -> None:
        for trace in traces:
            seen.extend(map(weakref.ref, (trace.inputs, *trace.gradients.values())))

    monkeypatch.setattr(gradients, "Layer", Watched)
    with Reader(folder) as reader:
        trace_layers(open_weights(folder, reader), windows, 0, use, lambda _: None, tmp_path)
    assert len(seen) > 8 and alive == [0] * 4
