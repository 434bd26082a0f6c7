"""A calibrated conversion that goes on repeats one layer at most, whatever stopped it."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from apertus_mlx.cli.app import app
from apertus_mlx.convert import job
from apertus_mlx.convert.calibration import allocation, calibrate, gradients, sensitivity
from apertus_mlx.convert.evaluation import layerwise
from apertus_mlx.convert.transforms import smoothing
from apertus_mlx.convert.write import execute
from apertus_mlx.convert.write.workspace import how_to_go_on, partial_path
from apertus_mlx.errors import ApertusError, ResourceError, UsageError
from tests.convert_builders import tree
from tests.resumable_work import Work, make_work


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def wholes(models: Path) -> Callable[[str], dict[str, bytes]]:
    """The outputs of runs that nothing happened to, by kind; each is made once."""
    found: dict[str, dict[str, bytes]] = {}

    def whole(kind: str) -> dict[str, bytes]:
        if kind not in found:
            target = models / kind / "out"
            target.parent.mkdir()
            make_work(kind, models).run(target)
            found[kind] = tree(target)
        return found[kind]

    return whole


class Counted:
    """Counts what a run does to layers; cuts it off at one of these, if told so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stop_at: int | None = None) -> None:
        self.done: list[str] = []
        self._stop_at = stop_at
        for module, name, path in (
            (calibrate, "_quantize_layer", lambda layer, *_: f"fit {layer.path}"),
            (calibrate, "_uncertainty", lambda *_: "embedding"),
            (calibrate, "fit", lambda weight, *_: "fit head" if len(weight) == 352 else ""),
            (smoothing, "_run", lambda layer, *_: f"smooth {layer.path}"),
            (layerwise, "run_layer", lambda layer, *_: getattr(layer, "path", "")),
            (gradients, "Layer", lambda _, index: f"trace {index}"),
            (gradients, "_loss_gradient", lambda *_: "loss"),
        ):  # fmt: skip
            monkeypatch.setattr(module, name, self._watched(getattr(module, name), path))

    def _watched(self, call: Callable[..., Any], name: Callable[..., str]) -> Callable[..., Any]:
        def watched(*arguments: Any) -> Any:
            if what := name(*arguments):
                if len(self.done) == self._stop_at:
                    raise KeyboardInterrupt
                self.done.append(what)
            return call(*arguments)

        return watched


@pytest.mark.nightly
@pytest.mark.parametrize("kind", ["gptq", "target"])
def test_going_on_repeats_at_most_one_layer(
    kind: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    wholes: Callable[[str], dict[str, bytes]],
) -> None:  # fmt: skip
    """Interrupted after every few layers, each time in the middle of the work on one."""
    expected = wholes(kind)
    target = tmp_path / "out"
    work = make_work(kind, models)
    with monkeypatch.context() as patch:
        counted = Counted(patch)
        (tmp_path / "counted").mkdir()
        work.run(tmp_path / "counted" / "out")
        total = counted.done
    done: list[str] = []
    runs = 0
    while not target.exists():
        runs += 1
        assert runs < 40
        with monkeypatch.context() as patch:
            counted = Counted(patch, stop_at=7 if kind == "gptq" else 16)
            try:
                work.run(target, resume=True)
            except KeyboardInterrupt:
                assert not target.exists()
            done += counted.done
    assert tree(target) == expected
    assert {*done} == {*total}
    assert runs > 2
    assert len(done) <= len(total) + runs - 1


@pytest.mark.parametrize(
    ("kind", "module", "place", "error"),
    [
        ("gptq", job, "make_card", OSError(errno.ENOSPC, "full")),
        *(
            pytest.param(*case, marks=pytest.mark.nightly)
            for case in (
                ("gptq", job, "make_card", RuntimeError("ours")),
                ("gptq", execute, "read_codes", MemoryError()),
                ("gptq", calibrate, "final_norm", RuntimeError("ours")),
                ("target", allocation, "_uniform_rival", RuntimeError("ours")),
            )
        ),
    ],
)
def test_a_failure_keeps_what_took_long(
    kind: str, module: Any, place: str, error: Exception, models: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, wholes: Callable[[str], dict[str, bytes]],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """A bug of ours and a disk that fails alike; the error says how to go on."""
    target = tmp_path / "out"
    work = make_work(kind, models)

    def fail(*_: Any, **__: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(module, place, fail)
        caplog.set_level("INFO", "apertus_mlx")
        with pytest.raises((type(error), ResourceError)) as caught:
            work.run(target)
    said = f"{caught.value} {caplog.text}"
    assert said.count(how_to_go_on(partial_path(target))) == 1
    assert isinstance(error, OSError) == isinstance(caught.value, ResourceError)
    assert not target.exists()
    with pytest.raises(UsageError, match="--resume"):
        work.run(target)
    with monkeypatch.context() as patch:
        counted = Counted(patch)
        work.run(target, resume=True)
    long = [what for what in counted.done if what.startswith(("fit model", "smooth", "trace"))]
    assert kind == "target" or not long
    assert not [what for what in counted.done if what.startswith("trace")]
    assert tree(target) == wholes(kind)


def test_a_bug_names_resume_on_the_command_line(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    work = make_work("gptq", models)
    monkeypatch.setattr(job, "make_card", None)
    with pytest.raises(TypeError):
        command(work, tmp_path / "out", "--bits", "3", "--method", "gptq")
    assert capsys.readouterr().err.count(how_to_go_on(tmp_path / ".out.partial")) == 1


def command(work: Work, target: Path, *options: str) -> None:
    app(
        ["convert", str(work.source), str(target), "--calibration", str(work.text), *options],
        standalone_mode=False,
    )


TARGET = ("--target-bpw", "4.5", "--group-size", "32", "--method", "gptq")


@pytest.mark.nightly
def test_what_a_plan_measured_is_used_by_the_conversion(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    work = make_work("target", models)
    (tmp_path / "fresh").mkdir()
    command(work, tmp_path / "fresh" / "out", *TARGET)
    target = tmp_path / "out"
    command(work, target, *TARGET, "--plan")
    assert not target.exists()
    assert f"{partial_path(target)}: holds what was measured" in capsys.readouterr().err
    with pytest.raises(UsageError, match="interrupted"):
        command(work, target, "--bits", "4", "--method", "gptq")
    with monkeypatch.context() as patch:
        patch.setattr(allocation, "predict_divergences", None)
        patch.setattr(allocation, "HeldOutComparison", None)
        command(work, target, *TARGET, "--plan")
        capsys.readouterr()
        command(work, target, *TARGET)
    assert "what was measured there for the same request is used" in capsys.readouterr().err
    assert tree(target) == tree(tmp_path / "fresh" / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fresh", "out"]


def test_a_plan_that_cannot_be_leaves_nothing(models: Path, tmp_path: Path) -> None:
    with pytest.raises(ApertusError, match="out of reach"):
        command(make_work("target", models), tmp_path / "out", "--target-bpw", "2", "--plan")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("size", "pattern"),
    [
        (0, "streams.npz"),
        pytest.param(60, "*.up_proj.npz", marks=pytest.mark.nightly),
        pytest.param(60, "damages.npz", marks=pytest.mark.nightly),
        pytest.param(0, "backward.npz", marks=pytest.mark.nightly),
    ],
)
def test_a_torn_file_counts_as_absent(
    size: int, pattern: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    wholes: Callable[[str], dict[str, bytes]],
) -> None:  # fmt: skip
    """As after a power loss on a disk that does not keep its promises."""
    kind = "target" if pattern in ("damages.npz", "backward.npz") else "gptq"
    place = (sensitivity, "_end_divergences") if kind == "target" else (calibrate, "final_norm")
    target = tmp_path / "out"
    work = make_work(kind, models)
    with monkeypatch.context() as patch:
        patch.setattr(*place, None)
        with pytest.raises(TypeError):
            work.run(target)
    torn = list(partial_path(target).rglob(pattern))
    assert torn
    for path in torn:
        with path.open("r+b") as file:
            file.truncate(size)
    work.run(target, resume=True)
    assert tree(target) == wholes(kind)
