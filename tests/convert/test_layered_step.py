"""Training layer by layer learns what MLX's gradient and update of the whole model would."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import numpy as np
import pytest
from mlx.utils import tree_flatten

from apertus_mlx.checkpoint import layout
from apertus_mlx.checkpoint.config import parse_config
from apertus_mlx.convert.distill import objective, training
from apertus_mlx.convert.distill.layered_step import LayeredStep
from apertus_mlx.convert.distill.partial_updates import PartialUpdates
from apertus_mlx.convert.distill.resources import Resources
from apertus_mlx.convert.distill.student import Quantized, RoundedNorm, Trained, assemble, quantized
from apertus_mlx.convert.distill.teacher_cache import Batch
from apertus_mlx.convert.distill.training import Options, Training
from apertus_mlx.model.apertus import Model
from apertus_mlx.quant.spec import QuantSpec
from benchmarks import make_checkpoint
from tests.builders import config_4x

SPEC = QuantSpec(4, 32)
STEPS, K = 3, 6


def make_student(trained: Trained, tied: bool, plain: str = "") -> Model:
    """Random weights; the matrix `plain` is not quantized."""
    config = parse_config(config_4x(tie_word_embeddings=tied))
    rng = np.random.default_rng(7)
    modules: dict[str, nn.Module] = {}
    arrays: dict[str, mx.array] = {}
    types: dict[str, mx.Dtype] = {}
    for matrix in layout.matrices(config):
        values = mx.array(rng.normal(0, 0.08, (matrix.rows, matrix.columns)).astype(np.float32))
        if matrix.path == plain:
            arrays[matrix.weight] = values
            continue
        tensors = mx.quantize(values, SPEC.group_size, SPEC.bits)
        modules[matrix.path] = quantized(matrix, tensors, SPEC, mx.bfloat16)
    for name, shape in layout.vectors(config):
        values = mx.array((1 + 0.1 * rng.standard_normal(shape)).astype(np.float32))
        if name.endswith("norm.weight"):
            norm = RoundedNorm(values, config.rms_norm_eps, mx.bfloat16)
            modules[name.removesuffix(".weight")] = norm
        else:
            arrays[name], types[name] = values, mx.bfloat16
    student = assemble(config, modules, arrays, types, trained)
    for module in student.modules():
        if isinstance(module, Quantized) and trained == "weights":
            # The outer ones at their bounds, which half of them want to cross.
            outwards = mx.where(module.codes == 15, 0.5, mx.where(module.codes == 0, -0.5, 0.0))
            module.codes = module.codes + outwards
    return student


def make_batches(count: int = STEPS) -> list[Batch]:
    """Windows in which tokens come again; a teacher that is sure of some."""
    rng = np.random.default_rng(3)
    found = []
    for _ in range(count):
        shares = rng.dirichlet(np.full(K + 1, 0.5), (2, 9)).astype(np.float32)
        likeliest = np.stack([rng.permutation(384)[:K] for _ in range(18)]).reshape(2, 9, K)
        tokens = rng.choice([3, 5, 80, 190, 191, 383], (2, 9))
        found.append(Batch(*map(mx.array, (tokens, likeliest.astype(np.uint32), shares))))
    return found


def make_optimizer(smooth: float) -> optimizers.MultiOptimizer:
    """As a run has it, but that a gradient of mere rounding moves nothing far."""
    optimizer = training._make_optimizer(Options(learning_rate=2e-3), STEPS)
    for each in optimizer.optimizers:
        each.eps = smooth
    return optimizer


def whole_steps(student: Model, batches: Sequence[Batch], smooth: float) -> tuple[list[float], Any]:
    """MLX's gradient of the whole model and its update; losses, and the optimizer's state."""

    def loss(batch: Batch) -> mx.array:
        logits = student(batch.tokens).reshape(18, -1)
        ends = mx.full((2, 1), -1, batch.tokens.dtype)
        following = mx.concatenate([batch.tokens[:, 1:], ends], axis=1).reshape(18)
        answers = batch.likeliest.reshape(18, K), batch.shares.reshape(18, K + 1)
        return objective.loss(logits, *answers, following, 0.1)[0]

    optimizer, losses = make_optimizer(smooth), []
    gradient = nn.value_and_grad(student, loss)
    for batch in batches:
        value, slopes = gradient(batch)
        optimizer.update(student, slopes)
        for module in student.modules():
            if isinstance(module, Quantized):
                module.keep_in_range()
        mx.eval(student.parameters(), optimizer.state)
        losses.append(value.item())
    return losses, optimizer.state


def arrays_of(tree: Any) -> dict[str, np.ndarray]:
    return {name: np.array(array) for name, array in tree_flatten(tree)}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 50 rows of the tables, the last one shorter, and of 8 tokens' logits."""
    monkeypatch.setattr("apertus_mlx.convert.distill.partial_updates.BLOCK_NUMBERS", 3200)


@pytest.mark.parametrize(
    ("trained", "tied", "plain"),
    [
        ("weights", True, ""),
        ("scales", False, layout.EMBEDDING),
        pytest.param("weights", False, "", marks=pytest.mark.nightly),
        pytest.param("scales", True, "", marks=pytest.mark.nightly),
        pytest.param("weights", False, layout.HEAD, marks=pytest.mark.nightly),
        pytest.param("scales", True, layout.EMBEDDING, marks=pytest.mark.nightly),
    ],
)
def test_layers_learn_as_the_whole_model_does(trained: Trained, tied: bool, plain: str) -> None:
    smooth = 1e-2
    students = [make_student(trained, tied, plain) for _ in range(2)]
    before = arrays_of(students[0].trainable_parameters())
    batches = make_batches()
    losses, state = whole_steps(students[0], batches, smooth)
    optimizer = make_optimizer(smooth)
    step = LayeredStep(students[1], optimizer, 0.1)
    assert [step.learn(batch).item() for batch in batches] == pytest.approx(losses, rel=1e-5)
    states = arrays_of(state), arrays_of(optimizer.state)
    assert states[0].keys() == states[1].keys()
    for name, wanted in states[0].items():
        assert wanted.dtype == states[1][name].dtype and wanted.shape == states[1][name].shape
        scale = np.abs(wanted).max()
        assert np.allclose(states[1][name], wanted, rtol=1e-3, atol=1e-4 * scale), name
    wanted, found = (arrays_of(student.trainable_parameters()) for student in students)
    assert wanted.keys() == found.keys() == before.keys()
    for name, values in wanted.items():
        moved = np.abs(values - before[name]).max()
        assert moved > 0, name
        assert np.allclose(found[name], values, atol=1e-3 * moved), name


def test_a_batch_is_judged_as_the_whole_model_judges_it() -> None:
    student, (batch,) = make_student("weights", True), make_batches(1)
    whole = training.WholeStep(student, make_optimizer(1e-2), 0.1).judge(batch)
    found = LayeredStep(student, make_optimizer(1e-2), 0.1).judge(batch)
    assert np.allclose([x.item() for x in found], [x.item() for x in whole], rtol=1e-5)


@pytest.mark.parametrize(("trained", "least"), [("weights", 12), ("scales", 1)])
def test_what_half_a_billion_weights_take(trained: Trained, least: int) -> None:
    """Below 8 GB, and more than what is learnt and its moments."""
    config = parse_config(make_checkpoint.config("0.5B"))
    resources = Resources(config, trained, 256)
    assert resources.by_layers
    assert least * layout.parameter_count(config) < resources.memory_bytes < 8.0e9


class Answers:
    """Batches with a teacher's answers, in memory."""

    def __init__(self, batches: list[Batch]) -> None:
        self._batches = batches
        self.tokens = sum(batch.tokens.size for batch in batches)

    def __len__(self) -> int:
        return len(self._batches)

    def batch(self, index: int) -> Batch:
        return self._batches[index]


def test_it_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted between two saved states."""
    monkeypatch.setattr(training, "VALIDATIONS", 2)
    ends = []
    for name, stops in (("whole", [0]), ("torn", [3, 0])):
        for stop in stops:
            student, steps = make_student("weights", True), []
            run = make_training(student, tmp_path / name)
            if stop:
                with pytest.raises(KeyboardInterrupt):
                    run.run(interrupting(steps, stop))
                continue
            history = run.run(interrupting(steps, stop))
            assert len(steps) == {"whole": 4, "torn": 2}[name]
            state = mx.load(str(tmp_path / name / training.STATE_FILE), return_metadata=True)
            ends.append((history, state[1], arrays_of((state[0], student.parameters()))))
    assert ends[0][:2] == ends[1][:2] and ends[0][2].keys() == ends[1][2].keys()
    for name, values in ends[0][2].items():
        assert np.array_equal(values, ends[1][2][name]), name


def test_a_state_with_other_names_counts_as_none(tmp_path: Path) -> None:
    run = make_training(make_student("scales", True), tmp_path / "run", lessons=1)
    run.run(lambda *_: None)
    assert run._resume().step == 1
    path = tmp_path / "run" / training.STATE_FILE
    arrays, metadata = mx.load(str(path), return_metadata=True)
    mx.eval(arrays)
    renamed = {name.replace("mlp.", "layer.mlp."): array for name, array in arrays.items()}
    mx.save_safetensors(str(path), renamed, metadata)
    assert run._resume().step == 0


def make_training(student: Model, folder: Path, lessons: int = 4) -> Training:
    folder.mkdir(exist_ok=True)
    answers: Any = [Answers(make_batches(count)) for count in (lessons, 1)]
    return Training(student, *answers, Options(), folder, by_layers=True)


def interrupting(steps: list[int], stop: int) -> Any:
    def progress(*_: Any) -> None:
        steps.append(1)
        if len(steps) == stop:
            raise KeyboardInterrupt

    return progress


def test_no_table_is_copied() -> None:
    """What an update of its rows takes beside the table, of 1 MB, and its moments."""
    config = parse_config(config_4x(vocab_size=4096))
    matrix = next(layout.matrices(config))
    values = mx.random.normal((matrix.rows, matrix.columns), key=mx.random.key(0))
    table = quantized(matrix, mx.quantize(values, 32, 4), SPEC, mx.bfloat16)
    table.learn_codes()
    model = nn.Module()
    model.table = table
    updates = PartialUpdates(make_optimizer(1e-8), model)
    for _ in range(2):
        updates.begin()
        mx.eval(model.parameters())
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        updates.update_rows("table", table, lambda rows: values[rows])
    assert mx.get_peak_memory() - before < 0.5 * table.codes.nbytes
