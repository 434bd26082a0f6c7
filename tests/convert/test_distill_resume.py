"""What a distillation keeps when it fails: answers, training, and a finished output."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from apertus_mlx.convert.distill import objective, run, teacher_cache
from apertus_mlx.convert.distill.run import Job, Observer, distill, prepare
from apertus_mlx.convert.distill.training import Options
from apertus_mlx.convert.write.keep import Keep
from apertus_mlx.convert.write.workspace import how_to_go_on, partial_path
from apertus_mlx.errors import ResourceError, UsageError
from tests.convert_builders import tree
from tests.resumable_work import Work, make_work

RATES = RATE, LOWER = 1e-3, 1e-4


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    return make_work("distill", tmp_path_factory.mktemp("work"))


def few_steps(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("apertus_mlx.convert.distill.resources.BATCH_TOKENS", 128)
    patch.setattr("apertus_mlx.convert.distill.training.VALIDATIONS", 3)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    few_steps(monkeypatch)


def job(work: Work, learning_rate: float = RATE) -> Job:
    options = Options(learning_rate=learning_rate)
    return prepare(work.source, work.student, "source", options, [work.text], 768, 32)


def without_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has said everything."""
    monkeypatch.setattr(teacher_cache, "hidden_states", None)


@pytest.fixture(scope="module")
def whole(work: Work, tmp_path_factory: pytest.TempPathFactory) -> dict[float, dict[str, bytes]]:
    """Outputs of runs that nothing happened to, by their rate."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        few_steps(patch)
        for rate in RATES:
            target = tmp_path_factory.mktemp("whole") / "out"
            distill(job(work, learning_rate=rate), target)
            found[rate] = tree(target)
    return found


@pytest.mark.parametrize(
    ("place", "error"),
    [("make_distilled_card", RuntimeError("ours")),
     pytest.param("_write_model", OSError(28, "full"), marks=pytest.mark.nightly),
     pytest.param("measure_receipt", MemoryError(), marks=pytest.mark.nightly)],
)  # fmt: skip
def test_a_failure_after_the_training_keeps_it(
    work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, error: Exception,
    whole: dict[float, dict[str, bytes]], caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    caplog.set_level("INFO", "apertus_mlx")
    target = tmp_path / "out"

    def fail(*_: Any, **__: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(run, place, fail)
        with pytest.raises((type(error), ResourceError)) as caught:
            distill(job(work), target)
    said = f"{caught.value} {caplog.text}"
    assert said.count(how_to_go_on(partial_path(target))) == 1
    assert not target.exists()
    trained: list[float] = []
    watch = Observer(lambda *_: None, lambda done, *_: trained.append(done), lambda *_: None)
    with monkeypatch.context() as patch:
        without_teacher(patch)
        distill(job(work), target, resume=True, observer=watch)
    assert not trained
    assert tree(target) == whole[RATE]


def test_a_loss_that_is_not_finite_costs_no_answers(
    work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    whole: dict[float, dict[str, bytes]],
) -> None:  # fmt: skip
    """With a lower rate it goes on, and comes to what a fresh run with that rate comes to."""
    target = tmp_path / "out"
    loss = objective.loss
    with monkeypatch.context() as patch:
        patch.setattr(objective, "loss", lambda *a: tuple(part * mx.nan for part in loss(*a)))
        with pytest.raises(UsageError, match=r"lower --learning-rate.*--resume"):
            distill(job(work), target)
    with monkeypatch.context() as patch:
        without_teacher(patch)
        distill(job(work, learning_rate=LOWER), target, resume=True)
    assert tree(target) == whole[LOWER]


def test_a_finished_output_is_not_taken_for_one_with_other_options(
    work: Work, tmp_path: Path, whole: dict[float, dict[str, bytes]]
) -> None:
    """Only its name was missing when the run ended; then another rate is asked for."""
    target = tmp_path / "out"

    def appear(*_: Any) -> None:
        target.mkdir(exist_ok=True)
        (target / "mine").touch()

    with pytest.raises(UsageError, match=r"meanwhile.*--resume"):
        distill(job(work), target, observer=Observer(appear, lambda *_: None, lambda *_: None))
    (target / "mine").unlink()
    distill(job(work, learning_rate=LOWER), target, resume=True)
    assert tree(target) == whole[LOWER]


def test_the_teacher_goes_on_at_its_layer(
    work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from apertus_mlx.convert.evaluation import layerwise

    layers: list[int] = []
    build = layerwise.Layer

    def counted(weights: Any, index: int, *rest: Any) -> Any:
        layers.append(index)
        if len(layers) == 4:
            raise KeyboardInterrupt
        return build(weights, index, *rest)

    target = tmp_path / "out"
    monkeypatch.setattr(Keep, "least_s", 0.0)
    monkeypatch.setattr(layerwise, "Layer", counted)
    with pytest.raises(KeyboardInterrupt):
        distill(job(work), target)
    assert partial_path(target).exists()
    # Held-out windows are answered; of the lessons the first of two layers is.
    assert layers == [0, 1, 0, 1]
    distill(job(work), target, resume=True)
    assert layers[4] == 1


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("state.safetensors", 0),
        pytest.param("best.safetensors", 100, marks=pytest.mark.nightly),
        pytest.param("000000.npz", 100, marks=pytest.mark.nightly),
    ],
)
def test_a_torn_file_counts_as_absent(
    work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, size: int,
    whole: dict[float, dict[str, bytes]],
) -> None:  # fmt: skip
    target = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(run, "write_golden", None)
        with pytest.raises(TypeError):
            distill(job(work), target)
    torn = list(partial_path(target).rglob(name))
    assert torn
    for path in torn:
        with path.open("r+b") as file:
            file.truncate(size)
    distill(job(work), target, resume=True)
    assert tree(target) == whole[RATE]
