"""`convert --tune`: the result is nearer the original, and of a large model the codes stay."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from apertus_mlx.backend.hardware import has_gpu
from apertus_mlx.backend.mlx import load_model
from apertus_mlx.convert.calibration import calibrated, memory, tuning
from apertus_mlx.convert.calibration.calibrated import Calibration, prepare_calibration
from apertus_mlx.convert.calibration.tuning import Tuning
from apertus_mlx.convert.distill import training
from apertus_mlx.convert.evaluation import little_text
from apertus_mlx.convert.evaluation.texts import language_windows, open_text
from apertus_mlx.convert.job import Job, convert, prepare
from apertus_mlx.convert.plan import plan as plan_module
from apertus_mlx.convert.plan.options import read_request
from apertus_mlx.convert.plan.plan import Plan
from apertus_mlx.convert.plan.policy import Request, Target
from apertus_mlx.convert.write.manifest import MANIFEST
from apertus_mlx.errors import ResourceError, UsageError
from apertus_mlx.hub.demo import model_dir
from apertus_mlx.model.apertus import Model
from apertus_mlx.quant.spec import QuantSpec
from tests.builders import config_4x, write_checkpoint
from tests.daily import every

REQUEST = Request(QuantSpec(2, 32), method="gptq")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    text = "\n\n".join(f"Line {n} has {n * n} birds, and the sea is calm today." for n in range(60))
    (folder / "en.txt").write_text(text)
    return write_checkpoint(folder / "source", config_4x(), dtype=mx.bfloat16)


def small_steps(patch: pytest.MonkeyPatch) -> None:
    """Many batches from little text, all of which calibrates, and nothing else."""
    patch.setattr(tuning, "CODES_LEARN_FROM", 0)
    patch.setattr(little_text, "ENOUGH_TOKENS", 1)
    patch.setattr(calibrated, "WINDOW_TOKENS", 64)
    patch.setattr(tuning, "TUNING_TOKENS", 256)
    patch.setattr(tuning, "EPOCHS", (4, 4))


def shorter(source: Path, folder: Path) -> Path:
    """The same model in `folder`, with less text beside it."""
    lines = (source.parent / "en.txt").read_text().split("\n\n")
    (folder / "en.txt").write_text("\n\n".join(lines[:40]))
    return Path(shutil.copytree(source, folder / "source"))


def job(source: Path, request: Request, target: Path | None = None) -> Job:
    text = source.parent / "en.txt"
    return prepare(source, request, "source", calibration_texts=[text], target=target)


def as_if_large(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(plan_module, "CODES_LEARN_UP_TO", 0)


@pytest.fixture(scope="module", params=["codes learn", "codes stay"])
def folders(
    request: pytest.FixtureRequest, source: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """The same conversion without and with `--tune`."""
    place = tmp_path_factory.mktemp("folders")
    with pytest.MonkeyPatch.context() as patch:
        small_steps(patch)
        if request.param == "codes stay":
            as_if_large(patch)
        plain, tuned = (
            convert(job(source, replace(REQUEST, tune=on)), place / str(on)) for on in (False, True)
        )
    return plain, tuned


def arrays(folder: Path) -> dict[str, mx.array]:
    found = mx.load(str(folder / "model.safetensors"))
    assert isinstance(found, dict)
    return found


def divergence(folder: Path, source: Path, windows: np.ndarray) -> float:
    """Mean over all positions, in float64, from the logits of the runtime."""
    logs = []
    for model in (source, folder):
        logits = np.array(load_model(model, "float32")(mx.array(windows)), np.float64)
        logits -= logits.max(-1, keepdims=True)
        logs.append(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
    return float((np.exp(logs[0]) * (logs[0] - logs[1])).sum(-1).mean())


def test_the_codes_are_those_of_the_calibration(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a large model: packed as they were, with other scales."""
    small_steps(monkeypatch)
    as_if_large(monkeypatch)
    monkeypatch.setattr(tuning, "EPOCHS", (1, 1))
    # Whether that is any better or not.
    for module in (training, tuning):
        monkeypatch.setattr(module, "best", lambda history, *_, **__: history[-1])
    source = shorter(source, tmp_path)
    found = job(source, replace(REQUEST, tune=True))
    (tmp_path / "codes").mkdir()
    assert found.calibration is not None
    calibrated.make_codes(
        found.plan, source, found.calibration, tmp_path / "codes", lambda *_: None
    )
    written = arrays(convert(found, tmp_path / "out"))
    assert found.plan.specs
    for step in found.plan.steps:
        if step.spec is not None:
            codes, scales, _ = calibrated.read_codes(tmp_path / "codes", step)
            assert mx.array_equal(written[f"{step.path}.weight"], codes)
            assert not mx.array_equal(written[f"{step.path}.scales"], scales)


def with_own_vocabulary(source: Path) -> Path:
    """Another model in the place of `source`, whose tokens can be cut."""
    shutil.rmtree(source)
    config = config_4x(vocab_size=1792, tie_word_embeddings=True)
    write_checkpoint(source, config, dtype=mx.bfloat16, tokenizer=False)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(model_dir() / name, source)
    return source


@pytest.mark.parametrize(
    "changes",
    every(
        4,
        [
            {"smooth": True, "rotate": True},
            {"default": None, "target": Target(4.5, group_size=32), "compare": True},
            {"vocab": 1024},
            {},
        ],
    ),
    ids=str,
)
def test_what_has_learnt_is_what_is_written(
    changes: dict[str, Any], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The runtime computes from the folder what the model in training computed last."""
    small_steps(monkeypatch)
    monkeypatch.setattr(
        "apertus_mlx.convert.job.HeldOutComparison.divergences", lambda *_, **__: [0.1, 0.2]
    )
    # Some windows that the original writes, too.
    monkeypatch.setattr(tuning, "CODES_LEARN_FROM", 1600)
    # The embedded model's tokens are longer, and so fewer.
    monkeypatch.setattr(tuning, "EPOCHS", (8, 8) if "vocab" in changes else (2, 2))
    # Far steps, and the last state is kept, though it is no better.
    monkeypatch.setattr(tuning, "LEARNING_RATES", {"weights": 1e-2})
    for module in (training, tuning):
        monkeypatch.setattr(module, "best", lambda history, *_, **__: history[-1])
    kept = []
    changed = 0

    def watched(plan: Plan, student: Model, folder: Path) -> None:
        nonlocal changed
        before = {s.path: calibrated.read_codes(folder, s)[0] for s in plan.steps if s.spec}
        save(plan, student, folder)
        for step in plan.steps:
            if step.spec:
                after = calibrated.read_codes(folder, step)[0]
                changed += not mx.array_equal(before[step.path], after)
        kept.append(student)

    save = tuning._save
    monkeypatch.setattr(tuning, "_save", watched)
    source = shorter(source, tmp_path)
    if "vocab" in changes:
        source = with_own_vocabulary(source)
    target = tmp_path / "out"
    folder = convert(job(source, replace(REQUEST, tune=True, **changes), target), target)
    record = json.loads((folder / MANIFEST).read_text())["tuning"]
    assert record["trained"] == "weights"
    assert record["own_windows"] + record["windows"] + record["deciding_windows"] == 1600 // 64
    ids = mx.array([[1, 100, 200, 300, 5, 60, 77]])
    assert changed > 3
    expected = np.array(kept[0](ids))
    logits = np.array(load_model(folder, "float32")(ids))
    assert np.allclose(logits, expected, atol=1e-5 * np.abs(expected).max())
    slopes = "model.layers.1.mlp.act_fn.alpha_n"
    assert not mx.array_equal(arrays(folder)[slopes], arrays(source)[slopes])


def test_codes_are_calibrated_on_what_the_original_writes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are those of the same text with these windows in it, and none is judged or decides."""
    small_steps(monkeypatch)
    source = shorter(source, tmp_path)
    found = job(source, replace(REQUEST, tune=True))
    texts = found.calibration
    assert texts is not None
    before = found.kept_bytes, found.minutes(tmp_path / "out")
    monkeypatch.setattr(tuning, "CODES_LEARN_FROM", 1600)
    assert found.kept_bytes > before[0]
    # How fast a GPU is nothing says before it has run.
    assert has_gpu() or (found.minutes(tmp_path / "out") or 0) > 0
    seen = []

    def stop(_: Plan, __: Path, texts: Calibration, *more: Any) -> None:
        seen.append(texts)
        raise KeyboardInterrupt

    monkeypatch.setattr("apertus_mlx.convert.job.make_codes", stop)
    with pytest.raises(KeyboardInterrupt):
        convert(found, tmp_path / "out")
    [taught] = seen
    windows = texts.sample.windows
    assert taught.sample.windows.size == 1600 and taught.judged is texts.judged
    assert np.array_equal(taught.sample.windows[: len(windows)], windows)
    own = Tuning.on(found.plan.source.config, windows).own_windows
    assert own == len(taught.sample.windows) - len(windows)


def test_a_tuning_goes_on_to_the_end(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though all states on the way are worse than the first, which is what is kept."""
    small_steps(monkeypatch)
    monkeypatch.setattr(tuning, "LEARNING_RATES", {"weights": 10.0})
    source = shorter(source, tmp_path)
    found = job(source, replace(REQUEST, tune=True))
    assert found.calibration is not None
    codes = tmp_path / "codes"
    codes.mkdir()
    calibrated.make_codes(found.plan, source, found.calibration, codes, lambda *_: None)
    record = tuning.tune(found.plan, source, found.calibration, codes, lambda *_: None)
    assert record["tokens_seen"] == record["epochs"] * record["windows"] * 64
    assert record["kl_after"] == record["kl_before"]


@pytest.mark.nightly
def test_what_changes(folders: tuple[Path, Path]) -> None:
    plain, tuned = map(arrays, folders)
    assert plain.keys() == tuned.keys()
    changed = {name for name in plain if not bool(mx.array_equal(plain[name], tuned[name]))}
    scales = {name for name in plain if name.endswith((".scales", ".biases"))}
    codes = {name for name in plain if plain[name].dtype == mx.uint32}
    norms = {name for name in plain if name.endswith(("norm.weight", "alpha_p", "alpha_n"))}
    record = json.loads((folders[1] / MANIFEST).read_text())["tuning"]
    # So little text moves hardly a code, if any.
    assert not changed & codes or record["trained"] == "weights"
    assert scales <= changed <= scales | norms | codes
    assert changed & norms


@pytest.mark.nightly
def test_the_receipt_says_what_was_gained(folders: tuple[Path, Path], source: Path) -> None:
    """Beside the divergences of both folders on the windows that decide."""
    texts = prepare_calibration(source, [source.parent / "en.txt"])
    manifests = [json.loads((folder / MANIFEST).read_text()) for folder in folders]
    assert manifests[0]["tuning"] is None
    record = manifests[1]["tuning"]
    windows = Tuning.on(None, texts.sample.windows).deciding  # type: ignore[arg-type]
    found = [divergence(folder, source, windows) for folder in folders]
    # The original names a part of the tokens, and the rest as one: never more than the whole.
    for said, whole in zip((record["kl_before"], record["kl_after"]), found, strict=True):
        assert 0.6 * whole < said < 1.001 * whole
    assert record["kl_after"] < record["kl_before"]
    assert any(note.startswith("--tune: on windows held") for note in manifests[1]["notes"])


@pytest.mark.nightly
def test_text_that_nothing_has_seen_is_nearer_too(folders: tuple[Path, Path], source: Path) -> None:
    texts = prepare_calibration(source, [source.parent / "en.txt"])
    [windows] = language_windows(texts.judged, *open_text(source), 512, 512)["en"][:1]
    before, after = (divergence(folder, source, windows) for folder in folders)
    assert after < before


def test_no_window_has_two_uses(source: Path) -> None:
    """Windows to learn from, to decide by and to judge by; of windows that repeat as well."""
    texts = prepare_calibration(source, [source.parent / "en.txt"])
    drawn = np.random.default_rng(0).integers(0, 9, (40, 2))
    for windows in (texts.sample.windows, drawn, drawn[:2], np.zeros((5, 2), np.int64)):
        divided = Tuning.on(None, windows)  # type: ignore[arg-type]
        lessons, deciding = (
            {row.tobytes() for row in part} for part in (divided.lessons, divided.deciding)
        )
        assert lessons.isdisjoint(deciding)
        assert lessons | deciding == {row.tobytes() for row in windows}
        assert divided.is_possible == bool(lessons and deciding)
    assert not Tuning.on(None, drawn[:1]).is_possible  # type: ignore[arg-type]


@pytest.mark.nightly
def test_what_does_not_get_better_stays(
    folders: tuple[Path, Path], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_steps(monkeypatch)
    monkeypatch.setattr(tuning, "EPOCHS", (1, 1))
    monkeypatch.setattr(tuning, "LEARNING_RATES", {"weights": 3.0})
    found = convert(job(source, replace(REQUEST, tune=True)), tmp_path / "out")
    assert (found / "model.safetensors").read_bytes() == (
        folders[0] / "model.safetensors"
    ).read_bytes()
    notes = json.loads((found / MANIFEST).read_text())["notes"]
    assert "--tune: on windows held out from it nothing got better; nothing was changed" in notes


@pytest.mark.parametrize(
    ("what", "alone", "message"),
    [
        ("calibration", 2, "source: calibration takes about 2.00 GB of .* available; --method se"),
        # With more text, which the original writes.
        ("calibration", 0, "source: --tune takes about 2.00 GB of .* are available; leave it out"),
        ("tuning", 2, "source: --tune takes about 2.00 GB of .* are available; leave it out"),
    ],
)
def test_what_does_not_fit_is_refused_before_it_begins(
    source: Path, what: str, alone: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def needed(_: object, tune: bool = False) -> int:
        return 2 * 10**9 if tune else alone * 10**9

    monkeypatch.setattr(memory, "available_bytes", lambda: 10**9)
    monkeypatch.setattr(memory, f"{what}_memory_bytes", needed)
    with pytest.raises(ResourceError, match=message):
        job(source, replace(REQUEST, tune=True))


def options(**given: object) -> Request:
    none = dict.fromkeys(
        ("bits", "group_size", "mode", "embed_bits", "head_bits", "recipe", "target_bpw",
         "target_size", "dtype", "vocab")
    )  # fmt: skip
    return read_request(**{**none, "rules": (), "vocab_for": (), **given})  # type: ignore[arg-type]


def test_best_is_gptq_tuned_and_compared() -> None:
    found = options(method="best", bits=2)
    assert found == Request(QuantSpec(2, 64), method="gptq", tune=True, compare=True)


@pytest.mark.parametrize("method", ["rtn", "search"])
def test_nothing_to_tune(method: str) -> None:
    with pytest.raises(UsageError, match=f"--tune: --method {method} calibrates nothing"):
        options(method=method, bits=2, tune=True)


def test_best_keeps_what_is_nearer(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Enough text or not; here calibration is made to lose."""
    monkeypatch.setattr(little_text, "ENOUGH_TOKENS", 1)
    monkeypatch.setattr(
        "apertus_mlx.convert.job.HeldOutComparison.divergences", lambda *_: [0.2, 0.1]
    )
    best = replace(REQUEST, tune=True, compare=True)
    plan = job(source, best, tmp_path / "out").plan
    assert (plan.request.method, plan.request.tune) == ("search", False)
    assert "without texts 0.1: method search is kept" in plan.notes[-1]
    assert job(source, replace(best, compare=False)).plan.request.tune
