"""Distillation: its loss, its surrogate gradients, and folders that hold what was trained."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import numpy as np
import pytest
from mlx.utils import tree_flatten

from apertus_mlx.backend.mlx import load_model
from apertus_mlx.checkpoint.config import parse_config
from apertus_mlx.cli.app import app
from apertus_mlx.convert.check.verify import verify
from apertus_mlx.convert.distill import objective, training
from apertus_mlx.convert.distill.run import SILENT, Job, Observer, distill, prepare
from apertus_mlx.convert.distill.student import (
    Quantized,
    make_student,
    straight_through,
)
from apertus_mlx.convert.distill.training import Options
from apertus_mlx.convert.evaluation.evaluate import measure
from apertus_mlx.convert.evaluation.layerwise import open_weights
from apertus_mlx.convert.evaluation.numpy_operations import compute_here
from apertus_mlx.convert.evaluation.texts import read_texts
from apertus_mlx.convert.job import convert
from apertus_mlx.convert.job import prepare as prepare_conversion
from apertus_mlx.convert.plan.policy import Request
from apertus_mlx.convert.sources.reading import Reader
from apertus_mlx.convert.write.manifest import MANIFEST
from apertus_mlx.convert.write.workspace import partial_path
from apertus_mlx.errors import ApertusError, RejectedError, ResourceError, UsageError
from apertus_mlx.model.apertus import Model
from apertus_mlx.quant.spec import QuantSpec
from apertus_mlx.text.tokenizer import Tokenizer
from tests.builders import config_4x, random_weights, write_checkpoint
from tests.trained_model import use_quick_products

WINDOW = 32
TEXT = "\n\n".join(f"Line {n} has {n * n} birds, and the sea is calm today." for n in range(120))
SMALL = 0.05 * np.random.default_rng(0).standard_normal((384, 64)).astype(np.float32)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has read a little of the text, so that its divergences mean something."""
    config = config_4x(torch_dtype="bfloat16", tie_word_embeddings=True)
    model = Model(parse_config(config))
    folder = tmp_path_factory.mktemp("models") / "teacher"
    weights = {**random_weights(config), "model.embed_tokens.weight": SMALL}
    write_checkpoint(folder, config, weights)
    use_quick_products(model)
    model.load_weights([(name, mx.array(value)) for name, value in weights.items()])
    for layer in model.layers:
        compute_here(layer)
    tokenizer = Tokenizer.load(folder, vocab_size=384, bos_token_id=1)
    ids = mx.array(tokenizer.encode(TEXT))
    rows = ids[: ids.size // WINDOW * WINDOW].reshape(-1, WINDOW)
    adam = optimizers.Adam(5e-3)
    gradient = nn.value_and_grad(
        model, lambda rows: nn.losses.cross_entropy(model(rows[:, :-1]), rows[:, 1:]).mean()
    )
    for step in range(30):
        adam.update(model, gradient(rows[step % 20 :: 20])[1])
        mx.eval(model.parameters())
    learned = {name: np.array(value) for name, value in tree_flatten(model.parameters())}
    return write_checkpoint(folder, config, {**weights, **learned}, dtype=mx.bfloat16)


@pytest.fixture(scope="module")
def student(teacher: Path) -> Path:
    request = Request(QuantSpec(2, 32))
    return convert(prepare_conversion(teacher, request, "teacher"), teacher.with_name("student"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "en.txt"
    path.write_text(TEXT)
    return path


def make_job(teacher: Path, student: Path, texts: Path, tokens: int = 1024, **options: Any) -> Job:
    defaults = {"text_share": 0.0, "learning_rate": 2e-3}
    return prepare(
        teacher, student, "teacher", Options(**{**defaults, **options}), [texts], tokens, WINDOW
    )


def small_batches(monkeypatch: pytest.MonkeyPatch, tokens: int = 128) -> None:
    """Many steps from little text."""
    monkeypatch.setattr("apertus_mlx.convert.distill.resources.BATCH_TOKENS", tokens)


# --- the loss ---------------------------------------------------------------------------------


def reference_loss(
    logits: np.ndarray, teacher_logits: np.ndarray, k: int, following: np.ndarray
) -> tuple[float, float, np.ndarray, np.ndarray]:
    """The loss by its definition in float64; also the k likeliest ids and the k + 1 shares."""

    def softmax(x: np.ndarray) -> np.ndarray:
        powers = np.exp(x - x.max(-1, keepdims=True))
        return powers / powers.sum(-1, keepdims=True)

    p, q = softmax(teacher_logits.astype(np.float64)), softmax(logits.astype(np.float64))
    likeliest = np.argsort(-p, -1)[:, :k]
    divergences, surprises, shares = [], [], []
    for row, ids in enumerate(likeliest):
        others = np.setdiff1d(np.arange(p.shape[1]), ids)
        parts = [(p[row, i], q[row, i]) for i in ids] + [
            (p[row, others].sum(), q[row, others].sum())
        ]
        divergences.append(sum(a * math.log(a / b) for a, b in parts))
        shares.append([a for a, _ in parts])
        if following[row] >= 0:
            surprises.append(-math.log(q[row, following[row]]))
    divergence = float(np.mean(divergences))
    return (
        0.9 * divergence + 0.1 * float(np.mean(surprises)),
        divergence,
        likeliest,
        np.array(shares),
    )


@pytest.mark.parametrize("k", [1, 8, 39])
def test_the_loss_is_its_definition(k: int) -> None:
    rng = np.random.default_rng(k)
    logits, other = 3 * rng.standard_normal((2, 12, 40)).astype(np.float32)
    following = rng.integers(-1, 40, 12)
    following[:2] = -1, 7
    wanted, divergence, likeliest, shares = reference_loss(logits, other, k, following)
    found = objective.loss(
        mx.array(logits), mx.array(likeliest.astype(np.uint32)),
        mx.array(shares.astype(np.float32)), mx.array(following), 0.1,
    )  # fmt: skip
    assert np.allclose([float(np.array(part)) for part in found], [wanted, divergence], rtol=1e-5)


def test_the_slope_of_the_loss_agrees_with_finite_differences() -> None:
    rng = np.random.default_rng(0)
    logits, other = 2 * rng.standard_normal((2, 5, 20)).astype(np.float32)
    following = np.array([3, -1, 0, 19, 4])
    _, _, likeliest, shares = reference_loss(logits, other, 6, following)
    arguments = (
        mx.array(likeliest.astype(np.uint32)), mx.array(shares.astype(np.float32)),
        mx.array(following), 0.1,
    )  # fmt: skip
    slope = np.array(mx.grad(lambda x: objective.loss(x, *arguments)[0])(mx.array(logits)))
    for row, column in ((0, 3), (1, 1), (2, int(likeliest[2, 0])), (4, int(likeliest[4, 5]))):
        shift = np.zeros_like(logits, np.float64)
        shift[row, column] = 1e-5
        ends = [reference_loss(logits + s * shift, other, 6, following)[0] for s in (1, -1)]
        assert slope[row, column] == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-3, abs=1e-6)


def test_extreme_logits_give_a_finite_loss_and_slope() -> None:
    logits = mx.array([[500.0, -500.0, 0.0, 0.0], [-500.0, 500.0, 500.0, 0.0]])
    likeliest = mx.array([[1, 0], [0, 3]], mx.uint32)
    shares = mx.array([[0.9, 0.1, 0.0], [1.0, 0.0, 0.0]])
    (loss, _), slope = mx.value_and_grad(
        lambda x: objective.loss(x, likeliest, shares, mx.array([0, 1]), 0.1)
    )(logits)
    assert np.isfinite(np.array(loss)) and np.isfinite(np.array(slope)).all()


# --- the student ------------------------------------------------------------------------------


def test_straight_through_is_exact() -> None:
    source = mx.random.normal((1000,), key=mx.random.key(0)) * 1e3
    value = mx.round(source)
    assert mx.array_equal(straight_through(value, source), value)


def test_gradients_are_those_of_the_surrogate() -> None:
    """Where a rounding stands, the surrogate adds what the argument moves by: in float64 here."""
    rng = np.random.default_rng(1)
    spec = QuantSpec(2, 32)
    codes = rng.uniform(-0.4, 3.4, (3, 64)).astype(np.float32)
    scales, biases = rng.uniform(0.05, 0.2, (2, 3, 2)).astype(np.float32)
    factor = rng.standard_normal((3, 64)).astype(np.float32)
    module = Quantized(*map(mx.array, (codes, scales, biases)), spec, mx.bfloat16)
    _, slopes = nn.value_and_grad(module, lambda m: (m.weights() * factor).sum())(module)

    def stored(values: np.ndarray) -> np.ndarray:
        return np.array(mx.array(values).astype(mx.bfloat16).astype(mx.float32), np.float64)

    def surrogate(moves: dict[str, np.ndarray]) -> float:
        q = np.clip(np.rint(codes), 0, 3) + moves.get("codes", 0)
        s = stored(scales) + module.unit * moves.get("scales", np.zeros((3, 2)))
        b = stored(biases) + module.unit * moves.get("biases", np.zeros((3, 2)))
        weights = np.repeat(s, 32, 1) * q + np.repeat(b, 32, 1)
        return float((weights * factor).sum())

    for name, shape in (("codes", (3, 64)), ("scales", (3, 2)), ("biases", (3, 2))):
        move = np.zeros(shape)
        for place in ((0, 0), (1, 1), (2, shape[1] - 1)):
            move[:] = 0
            move[place] = 1e-4
            wanted = (surrogate({name: move}) - surrogate({name: -move})) / 2e-4
            assert float(np.array(slopes[name])[place]) == pytest.approx(wanted, rel=1e-4, abs=1e-6)


@pytest.mark.nightly
def test_an_untrained_student_is_the_stored_model(student: Path) -> None:
    ids = mx.array([[1, 100, 200, 300, 5], [1, 7, 90, 91, 92]])
    expected = np.array(load_model(student, "float32")(ids))
    for trained in training_modes():
        with Reader(student) as reader:
            model = make_student(open_weights(student, reader), trained)
        assert np.allclose(np.array(model(ids)), expected, atol=1e-5 * np.abs(expected).max())


def training_modes() -> tuple[Any, ...]:
    return ("weights", "scales")


# --- folders ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "trained",
    [
        pytest.param(mode, marks=[pytest.mark.nightly] * (mode == "weights"))
        for mode in training_modes()
    ],
)
def test_a_student_learns(
    teacher: Path, student: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    trained: Any,
) -> None:  # fmt: skip
    """Closer to its teacher on text that it has not seen, in the same format and bytes."""
    small_batches(monkeypatch, 64)
    monkeypatch.setattr(training, "VALIDATIONS", 5)
    # Codes need evidence from many steps before they move, scales do not.
    options = {"epochs": 10, "learning_rate": 5e-4} if trained == "weights" else {"epochs": 2}
    job = make_job(teacher, student, texts, trained=trained, **options)
    outcome = distill(job, tmp_path / "out", observer=SILENT)
    out = tmp_path / "out"
    before = measure(student, teacher, job.judged).overall.kl_mean
    after = measure(out, teacher, job.judged).overall.kl_mean
    assert after < 0.8 * before
    assert outcome.quality["overall"]["kl_mean"] == after
    data = [(folder / "model.safetensors").read_bytes() for folder in (student, out)]
    header = 8 + int.from_bytes(data[0][:8], "little")
    assert len(data[0]) == len(data[1]) and data[0][:header] == data[1][:header]
    assert data[0] != data[1]
    assert not verify(out).errors
    assert (out / "config.json").read_bytes() == (student / "config.json").read_bytes()
    manifest = json.loads((out / MANIFEST).read_text())
    assert manifest["distillation"]["trained"] == trained
    assert manifest["distillation"]["tokens_seen"] == options["epochs"] * job.sample.windows.size
    assert manifest["quality"]["overall"]["kl_mean"] == after
    assert "then distillation" in (out / "README.md").read_text()
    assert not [p for p in tmp_path.iterdir() if p != out] and not list(out.glob(".*"))
    words = {f: codes(f) for f in (student, out)}
    assert (words[student] == words[out]) == (trained == "scales")


def test_a_student_of_another_size_learns_to_draft(
    teacher: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its acceptance beside that of MLX's logits, in float64."""
    small_batches(monkeypatch)
    config = config_4x(torch_dtype="bfloat16", hidden_size=32, num_hidden_layers=1)
    small = write_checkpoint(tmp_path / "small", config, dtype=mx.bfloat16)
    student = convert(
        prepare_conversion(small, Request(QuantSpec(4, 32)), "small"), tmp_path / "small-4bit"
    )
    job = make_job(teacher, student, texts, 512, epochs=2, learning_rate=1e-2)
    outcome = distill(job, tmp_path / "out", observer=SILENT)
    before = measure(student, teacher, job.judged).overall.acceptance
    found = outcome.quality["overall"]["acceptance"]
    assert found > 1.1 * before
    assert f"{found:.1%} of its guesses" in (tmp_path / "out" / "README.md").read_text()
    assert not verify(tmp_path / "out").errors

    judged = tmp_path / "few.txt"
    judged.write_text("Line 7 has 49 birds, and the sea is calm.")
    ids = mx.array(
        [[1, *Tokenizer.load(teacher, vocab_size=384, bos_token_id=1).encode(judged.read_text())]]
    )
    p, q = (
        np.exp(np.array(load_model(folder, "float32")(ids)[0], np.float64))
        for folder in (teacher, tmp_path / "out")
    )
    p, q = (x / x.sum(-1, keepdims=True) for x in (p, q))
    evaluation = measure(tmp_path / "out", teacher, read_texts([judged]))
    assert evaluation.overall.tokens == len(p)
    assert evaluation.overall.acceptance == pytest.approx(np.minimum(p, q).sum(-1).mean(), 1e-4)


def codes(folder: Path) -> dict[str, bytes]:
    arrays = mx.load(str(folder / "model.safetensors"))
    assert isinstance(arrays, dict)
    return {n: np.array(a).tobytes() for n, a in arrays.items() if a.dtype == mx.uint32}


@pytest.mark.parametrize(("patience", "kept"), [(8, 2), (None, -1)])
def test_a_run_to_the_end_keeps_its_last_state(
    teacher: Path, student: Path, texts: Path, tmp_path: Path,
    patience: int | None, kept: int, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Where validations say that the third was the closest; a run that can stop early takes it."""
    small_batches(monkeypatch)
    states: list[dict[str, bytes]] = []

    class Watched(training.Training):
        def _validate(self, *given: Any) -> training.Validation:
            found = super()._validate(*given)
            states.append(self.state())
            seeming = {0: 1.0, 2: 0.1}.get(len(states) - 1, 0.5)
            return replace(found, held_out_divergence=seeming)

        def run(self, progress: Any) -> Any:
            history = super().run(progress)
            states.append(self.state())
            return history

        def state(self) -> dict[str, bytes]:
            return {name: np.array(a).tobytes() for name, a in tree_flatten(self._parameters())}

    monkeypatch.setattr("apertus_mlx.convert.distill.run.Training", Watched)
    distill(make_job(teacher, student, texts, patience=patience), tmp_path / "out")
    *judged, final = states
    assert len(judged) > 3 and judged[2] != judged[-1]
    assert final == judged[kept]


def test_what_was_trained_is_what_is_stored(
    teacher: Path, student: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The runtime's logits, and mlx-lm's, are those of the student in memory."""
    small_batches(monkeypatch)
    kept = []

    class Watched(training.Training):
        def run(self, progress: Any) -> Any:
            history = super().run(progress)
            kept.append(self._student)
            return history

    monkeypatch.setattr("apertus_mlx.convert.distill.run.Training", Watched)
    distill(make_job(teacher, student, texts), tmp_path / "out")
    ids = mx.array([[1, 100, 200, 300, 5, 60, 77]])
    expected = np.array(kept[0](ids))
    found = np.array(load_model(tmp_path / "out", "float32")(ids))
    scale = np.abs(expected).max()
    assert np.allclose(found, expected, atol=1e-5 * scale)
    utils = pytest.importorskip("mlx_lm.utils")
    theirs, _ = utils.load_model(tmp_path / "out")
    theirs.set_dtype(mx.float32)
    assert np.allclose(np.array(theirs(ids)), expected, atol=1e-4 * scale)


def interrupting(after_tokens: int) -> Observer:
    def stop(done: int, *_: Any) -> None:
        if done >= after_tokens:
            raise KeyboardInterrupt

    return replace(SILENT, training=stop)


@pytest.mark.parametrize("by_layers", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_an_interrupted_run_ends_as_one_that_was_not(
    teacher: Path, student: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    by_layers: bool,
) -> None:  # fmt: skip
    small_batches(monkeypatch)
    if by_layers:
        monkeypatch.setattr("apertus_mlx.convert.distill.resources.KEPT_BYTES", 0)
    monkeypatch.setattr(training, "VALIDATIONS", 5)
    job = make_job(teacher, student, texts, 512, epochs=2)
    whole = distill(job, tmp_path / "whole")
    for tokens in (200, 650):
        with pytest.raises(KeyboardInterrupt):
            distill(job, tmp_path / "torn", tokens > 200, interrupting(tokens))
        assert not (tmp_path / "torn").exists()
    # The teacher has said everything.
    monkeypatch.setattr("apertus_mlx.convert.distill.teacher_cache.hidden_states", None)
    torn = distill(job, tmp_path / "torn", resume=True)
    assert torn.history == whole.history
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "torn")]
    assert files[0] == files[1]


def test_another_request_does_not_resume(
    teacher: Path, student: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_batches(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        distill(make_job(teacher, student, texts), tmp_path / "out", observer=interrupting(500))
    with pytest.raises(UsageError, match="--resume"):
        distill(make_job(teacher, student, texts), tmp_path / "out")
    with pytest.raises(UsageError, match="other options"):
        distill(make_job(teacher, student, texts, top_k=7), tmp_path / "out", resume=True)


@pytest.mark.nightly
def test_a_kill_leaves_nothing_half(
    teacher: Path, student: Path, texts: Path, tmp_path: Path
) -> None:
    """SIGKILL in the middle of the training; then it goes on and the output is whole."""
    out = tmp_path / "out"
    command = [
        "distill", str(teacher), str(student), str(out), "--text", str(texts),
        "--window", str(WINDOW), "--epochs", "2",
    ]  # fmt: skip
    script = (
        "import os, signal, sys\n"
        "from apertus_mlx.convert.distill import resources, training\n"
        "resources.BATCH_TOKENS = 128\n"
        "save, calls = training._save, []\n"
        "def kill(path, *rest):\n"
        "    save(path, *rest); calls.append(path)\n"
        "    if len(calls) == int(os.environ.get('KILL_AT', '0')):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "training._save = kill\n"
        "from apertus_mlx.cli import main\n"
        "main()\n"
    )
    run = [sys.executable, "-c", script, *command]
    killed = subprocess.run(
        run, env={**os.environ, "KILL_AT": "6"}, capture_output=True, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    assert not out.exists() and partial_path(out).exists()
    resumed = subprocess.run([*run, "--resume"], capture_output=True, text=True, check=False)
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout == f"{out}\n" and "held out" in resumed.stderr
    assert not verify(out).errors and not partial_path(out).exists()


@pytest.mark.nightly
def test_a_stale_run_stops_early_with_the_best_weights(
    teacher: Path, student: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_batches(monkeypatch)
    job = make_job(teacher, student, texts, learning_rate=0.1, epochs=8)
    outcome = distill(job, tmp_path / "out")
    history = outcome.history
    best = min(history, key=lambda validation: validation.held_out_divergence)
    if history[-1].tokens < 8 * job.sample.windows.size:
        assert len(history) - 1 - history.index(best) == job.options.patience
    assert outcome.record["best_step"] == best.step
    assert best.held_out_divergence <= history[0].held_out_divergence


@pytest.mark.parametrize(
    ("share", "losses", "divergences", "told"),
    [
        (0.1, [3.0, 2.8, 2.9], [0.2, 0.21, 0.3], True),
        (0.1, [3.0, 2.8, 2.9], [0.2, 0.19, 0.3], False),
        (0.1, [3.0, 3.1, 3.2], [0.2, 0.21, 0.3], False),
        (0.0, [0.2, 0.1, 0.3], [0.2, 0.21, 0.3], False),
    ],
)
def test_a_text_that_leads_away_is_named(
    share: float, losses: list[float], divergences: list[float], told: bool
) -> None:
    history = [
        training.Validation(step, step, None, loss, divergence)
        for step, (loss, divergence) in enumerate(zip(losses, divergences, strict=True))
    ]
    note = training.text_note(Options(text_share=share), history)
    assert (note is not None and note.startswith("--text-share 0.1: ")) == told


# --- what cannot be done ----------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_the_run(
    teacher: Path, student: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = objective.loss
    monkeypatch.setattr(objective, "loss", lambda *a: tuple(part * mx.nan for part in loss(*a)))
    with pytest.raises(UsageError, match="not finite; lower --learning-rate") as caught:
        distill(make_job(teacher, student, texts), tmp_path / "out")
    assert "\n" not in str(caught.value)
    # The teacher's answers stay, for another rate.
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]


def test_a_teacher_of_other_tokens(student: Path, texts: Path, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other", config_4x(vocab_size=352))
    with pytest.raises(UsageError, match="or a part of them"):
        make_job(other, student, texts)


def test_a_student_that_is_not_quantized(teacher: Path, texts: Path, tmp_path: Path) -> None:
    plain = convert(prepare_conversion(teacher, Request(), "teacher"), tmp_path / "plain")
    with pytest.raises(UsageError, match="not quantized; convert --bits"):
        make_job(teacher, plain, texts)


def test_a_student_without_affine_codes(teacher: Path, texts: Path, tmp_path: Path) -> None:
    request = Request(QuantSpec(4, 32, "mxfp4"))
    other = convert(prepare_conversion(teacher, request, "teacher"), tmp_path / "mxfp4")
    with pytest.raises(UsageError, match="only affine codes learn"):
        make_job(teacher, other, texts)


def test_a_student_that_convert_did_not_make(teacher: Path, texts: Path) -> None:
    with pytest.raises(RejectedError, match=MANIFEST):
        make_job(teacher, teacher, texts)


def test_what_does_not_fit_into_memory_is_refused(
    teacher: Path, student: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = make_job(teacher, student, texts).resources.memory_bytes
    monkeypatch.setattr("apertus_mlx.convert.distill.resources.available_bytes", lambda: needed - 1)
    with pytest.raises(ResourceError, match="--train scales"):
        make_job(teacher, student, texts)
    make_job(teacher, student, texts, trained="scales")


def test_too_little_text(teacher: Path, student: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("A few words.")
    with pytest.raises(UsageError, match="at least two windows"):
        make_job(teacher, student, short)


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--train", "everything"], 2, "weights or scales"),
        (["--learning-rate", "0"], 2, "above 0"),
        (["--learning-rate", "nan"], 2, "above 0"),
        (["--text-share", "1.5"], 2, "expected 0 to 1"),
        (["--plot", "curve.txt"], 2, "--plot"),
        (["--text", "absent.txt"], 4, "no such file"),
    ],
)
def test_requests_that_make_no_sense(
    teacher: Path, student: Path, tmp_path: Path, options: list[str], code: int, message: str
) -> None:
    out = tmp_path / "out"
    with pytest.raises(ApertusError, match=message) as caught:
        app(["distill", str(teacher), str(student), str(out), *options], standalone_mode=False)
    assert caught.value.exit_code == code
    assert not list(tmp_path.iterdir())


def test_the_command_prints_a_summary_and_draws_the_losses(
    teacher: Path, student: Path, texts: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    pytest.importorskip("matplotlib")
    small_batches(monkeypatch)
    plot, out = tmp_path / "curve.svg", tmp_path / "out"
    command = [
        "distill", str(teacher), str(student), str(out), "--text", str(texts), "--tokens", "512",
        "--window", str(WINDOW), "--plot", str(plot), "--json",
    ]  # fmt: skip
    app(command, standalone_mode=False)
    captured = capsys.readouterr()
    summary = json.loads(captured.out)
    assert summary["output"] == str(out) and summary["tokens_seen"] == 512
    assert summary["quality"]["overall"]["kl_mean"] > 0
    assert "divergence from the teacher" in captured.err
    assert plot.read_text().lstrip().startswith("<?xml")
