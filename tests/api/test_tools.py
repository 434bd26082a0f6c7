"""The functions of `apertus_mlx.tools`, beside their commands, MLX and mlx-lm."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import apertus_mlx
from apertus_mlx import convert_model, distill, evaluate, plan, verify
from apertus_mlx.backend.mlx import load_model
from apertus_mlx.cli.app import app
from apertus_mlx.errors import ApertusError, NotFoundError, ResourceError, UsageError
from apertus_mlx.system.progress import Progress
from tests.builders import config_4x, write_checkpoint
from tests.hub_server import point_client_at, serving

TEXT = "\n\n".join(f"Line {n} has {n * n} birds, and the sea is calm today." for n in range(60))
LEARNING = {"tokens": 256, "window": 32, "seed": 3}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "source"
    return write_checkpoint(folder, config_4x(), dtype=mx.bfloat16)


@pytest.fixture(scope="module")
def model(source: Path) -> Path:
    return convert_model(source, source.with_name("q4"), bits=4, group_size=32).output


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "en.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def silent(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Whatever the test calls prints nothing, on no stream."""
    capfd.readouterr()
    yield
    assert capfd.readouterr() == ("", "")


def command(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    """What a command prints with `--json`."""
    capsys.readouterr()
    app([*map(str, arguments), "--json"], standalone_mode=False)
    return json.loads(capsys.readouterr().out)  # type: ignore[no-any-return]


def seen_by(call: Callable[..., Any]) -> tuple[Any, list[Progress]]:
    """The result of a call, and what its `progress` was told."""
    told: list[Progress] = []
    return call(told.append), told


# --- the package


def test_the_package_offers_them_when_they_are_asked_for() -> None:
    names = {"convert_model", "plan", "verify", "evaluate", "distill"}
    assert names <= set(apertus_mlx.__all__) <= set(dir(apertus_mlx))
    with pytest.raises(AttributeError, match="'apertus_mlx' has no attribute 'nothing'"):
        _ = apertus_mlx.nothing
    script = (
        "import sys, apertus_mlx\n"
        "assert 'apertus_mlx.tools' not in sys.modules\n"
        "from apertus_mlx import convert_model\n"
        "heavy = {'mlx', 'numpy', 'huggingface_hub', 'typer', 'tqdm', 'apertus_mlx.convert'}\n"
        "assert not heavy & {*sys.modules}, heavy & {*sys.modules}\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


# --- converting


def test_a_conversion_is_that_of_the_command(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same bytes, and the same summary."""
    options = {"bits": 4, "group_size": 32, "embed_bits": 6, "method": "search"}
    done = convert_model(str(source), tmp_path / "a", **options, set=["*.down_proj=3:64"])
    words = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    printed = command(
        capsys, "convert", source, "--out", tmp_path / "b", *words, "--set", "*.down_proj=3:64"
    )
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert files[0] == files[1]
    assert done.output == tmp_path / "a" and done.written
    assert {**done.as_json(), "output": "", "manifest": ""} == {
        **printed, "output": "", "manifest": "",
    }  # fmt: skip


def test_mlx_lm_computes_what_the_output_says(source: Path, tmp_path: Path) -> None:
    utils = pytest.importorskip("mlx_lm.utils")
    model = convert_model(source, tmp_path / "out", bits=4, dtype="float32").output
    ids = mx.array([[1, 100, 200, 300]])
    theirs, _ = utils.load_model(model)
    found = theirs(ids)
    assert mx.allclose(found, load_model(model)(ids), atol=1e-4)
    assert not mx.allclose(found, load_model(source)(ids), atol=1e-2)


@pytest.mark.usefixtures("silent")
def test_a_plan_writes_nothing_and_says_what_would_be_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    planned = convert_model(source, bits=3, plan=True)
    assert not planned.written and planned.output == Path("source-MLX-3bit")
    assert not list(tmp_path.iterdir())
    done = convert_model(source, bits=3)
    weights = mx.load(str(done.output / "model.safetensors"))
    assert isinstance(weights, dict)
    assert planned.as_json()["output_bytes"] == sum(array.nbytes for array in weights.values())
    assert {m["module"] for m in planned.as_json()["modules"] if m["bits"] == 3} == {
        name.removesuffix(".scales") for name in weights if name.endswith(".scales")
    }


def assert_each_part_runs_once_to_its_end(told: list[Progress]) -> None:
    """Nothing goes back or begins again under a name that has been at its end."""
    parts = [list(part) for _, part in groupby(told, lambda each: (each.stage, each.detail))]
    assert len(parts) == len({(part[0].stage, part[0].detail) for part in parts})
    for part in parts:
        assert len({each.total for each in part}) == 1
        assert all(before.done <= after.done for before, after in pairwise(part))
        assert part[-1].done == part[-1].total


@pytest.mark.nightly
@pytest.mark.usefixtures("silent")
def test_progress_of_a_conversion_to_a_size(source: Path, tmp_path: Path, text: Path) -> None:
    """Of 2 layers: both ways; the original, two plans that round and then predict, and the same
    with codes.

    Of so little text methods are compared, too: the original, scales, codes and predictions,
    predictions alone.
    """
    options = {"target_bpw": 6.5, "method": "gptq", "smooth": True, "calibration": text}
    _, told = seen_by(
        lambda progress: convert_model(source, tmp_path / "out", **options, progress=progress)
    )
    assert_each_part_runs_once_to_its_end(told)
    runs = {each.stage: each.total for each in told if each.unit == "layers"}
    assert runs == {
        "measuring": 2 * 2,
        "comparing sizes": (2 + 2 * 2 * (1 + 1) + 4) + (2 + 2 * 2 * (1 + 2 + 1) + 4),
        "comparing methods": 2 + 2 * (1 + 2 + 1) + 2 + 4, "calibrating": 2 * (1 + 2),
        "evaluating": 2 * 3 + 4,
    }  # fmt: skip


@pytest.mark.usefixtures("silent")
def test_progress_of_a_conversion(source: Path, tmp_path: Path, text: Path) -> None:
    done, told = seen_by(
        lambda progress: convert_model(
            source, tmp_path / "out", bits=4, method="gptq", calibration=text, progress=progress
        )
    )
    assert {"calibrating", "converting"} <= {each.stage for each in told}
    assert_each_part_runs_once_to_its_end(told)
    last = [each for each in told if each.stage == "converting"][-1]
    assert (last.done, last.unit) == (last.total, "bytes")
    assert last.total == done.plan.source_bytes


def test_what_a_user_may_want_to_know_is_logged(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "apertus_mlx")
    convert_model(source, tmp_path / "out", bits=4)
    assert caplog.messages[-1].endswith("bits per weight")


@pytest.mark.parametrize(
    ("name", "values"), [("target_bpw", (9, 9.0, "9")), ("target_size", (10**12, "1TB"))]
)
def test_a_target_is_a_number_or_a_text(
    source: Path, tmp_path: Path, text: Path, name: str, values: tuple[Any, ...]
) -> None:
    said = set()
    for value in values:
        with pytest.raises(UsageError, match="out of reach") as refused:
            convert_model(source, tmp_path / "out", calibration=text, **{name: value})
        said.add(str(refused.value))
    assert len(said) == 1


# --- from the Hub


@pytest.mark.usefixtures("silent")
def test_a_source_on_the_hub(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as server:
        point_client_at(server.endpoint, tmp_path / "home", monkeypatch)
        commit = server.repository("swiss-ai/Tiny").commit_folder(source)
        done, told = seen_by(
            lambda progress: convert_model(
                "swiss-ai/Tiny", tmp_path / "out", bits=4, progress=progress
            )
        )
        downloads = [each for each in told if each.stage == "downloading"]
        assert downloads[-1].done == downloads[-1].total and downloads[-1].total
        assert (done.source, done.commit) == ("swiss-ai/Tiny", commit)
        server.requests.clear()
        assert plan("swiss-ai/Tiny").file_bytes == plan(source).file_bytes
        assert not [
            each
            for each in server.requests
            if each.path.endswith(".safetensors") and not each.range
        ]
        server.requests.clear()
        # A `Path` is a folder.
        for call in (convert_model, plan, verify):
            with pytest.raises(NotFoundError, match="swiss-ai/Tiny"):
                call(Path("swiss-ai/Tiny"))
        assert not server.requests


# --- planning


def test_a_plan_of_memory_is_that_of_the_command(
    source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"device": "m1-8gb", "context": 300, "max_kv": 128, "prefill_step": 64}
    words = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    found = plan(source, **options)
    assert found.as_json() == command(capsys, "plan", source, *words)
    (run,) = found.forms
    weights = mx.load(str(source / "model.safetensors"))
    assert isinstance(weights, dict)
    # xIELU's constants are given as numbers.
    stored = sum(array.nbytes for array in weights.values())
    assert run.weights_bytes == pytest.approx(stored, rel=1e-3)
    assert not plan(source, device="1MB").forms[0].fits


@pytest.mark.usefixtures("silent")
def test_the_embedded_model_is_planned_where_none_is_given() -> None:
    assert plan().parameters > 1e6
    by_name, without = (convert_model(each, bits=4, plan=True) for each in ("embedded", None))
    assert by_name.as_json() == without.as_json()
    assert (by_name.output, by_name.source) == (without.output, "apertus-demo")


# --- verifying


@pytest.mark.usefixtures("silent")
def test_a_planted_damage_is_found(source: Path, tmp_path: Path) -> None:
    folder = convert_model(source, tmp_path / "out", bits=4).output
    found = verify(folder)
    assert not found.errors and found.files == len(list(folder.iterdir()))
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    (error,) = verify(str(folder)).errors
    assert (error.level, error.where) == ("error", "model.safetensors")


def test_a_verification_is_that_of_the_command(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify(model).as_json() == command(capsys, "verify", model)


# --- evaluating


def test_an_evaluation_is_that_of_the_command_and_of_the_definition(
    source: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = tmp_path / "de.txt"
    words.write_text("Ein kurzer Satz, und noch einer.")
    found = evaluate([model, source], reference=source, text=words)
    printed = command(capsys, "eval", model, source, "--reference", source, "--text", words)
    assert found.as_json() == printed and list(found.models) == ["q4", "source"]
    assert found.models["source"].overall.kl_mean == pytest.approx(0, abs=1e-6)
    one = evaluate(str(model), reference=str(source), text=[str(words)])
    assert one.as_json() == printed["models"]["q4"]
    # The builder's tokenizer has a token for each byte, after its special tokens.
    from apertus_mlx.text.tokenizer import Tokenizer

    ids = Tokenizer.load(source, vocab_size=384, bos_token_id=1).encode(words.read_text())
    logs = [
        np.array(nn.log_softmax(load_model(folder, "float32")(mx.array([[1, *ids]]))[0], axis=-1))
        for folder in (source, model)
    ]
    divergences = (np.exp(logs[0]) * (logs[0] - logs[1])).sum(-1)
    assert one.models["q4"].overall.kl_mean == pytest.approx(divergences.mean(), rel=1e-3)


@pytest.mark.usefixtures("silent")
def test_progress_of_an_evaluation(source: Path, model: Path, text: Path) -> None:
    _, told = seen_by(
        lambda progress: evaluate(model, reference=source, text=text, progress=progress)
    )
    # Comparing counts as two layers, for the noise floor and for the model.
    assert told[-1] == Progress("measuring", 10, 10, "layers")
    done = [each.done for each in told]
    assert done == sorted(done) and {1, 2, 3, 4, 6, 7, 8, 10} <= set(done)


# --- distilling


def test_a_distillation_is_that_of_the_command(
    source: Path,
    model: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "apertus_mlx")
    done, told = seen_by(
        lambda progress: distill(
            source, model, tmp_path / "a", text=text, **LEARNING, progress=progress
        )
    )
    assert capsys.readouterr() == ("", "")
    words = [f"--{name}={value}" for name, value in LEARNING.items()]
    printed = command(capsys, "distill", source, model, tmp_path / "b", "--text", text, *words)
    assert {**done.as_json(), "output": ""} == {**printed, "output": ""}
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert files[0] == files[1]
    assert not verify(done.output).errors
    assert {each.stage for each in told} == {"asking the teacher", "learning", "measuring"}
    learning = [each for each in told if each.stage == "learning"][-1]
    assert learning.done == learning.total == 256
    assert learning.detail.startswith("loss ") and done.history[-1].tokens == 256
    # Of so little text codes learn nothing, which is said and true.
    assert "too few for any code to change" in caplog.text
    before, after = (mx.load(str(folder / "model.safetensors")) for folder in (model, done.output))
    codes = [name for name, array in before.items() if array.dtype == mx.uint32]
    assert codes and all(mx.array_equal(before[name], after[name]) for name in codes)
    scales = [name for name in before if name.endswith(".scales")]
    assert not all(mx.array_equal(before[name], after[name]) for name in scales)


def test_the_embedded_teacher_is_called_as_in_a_conversion(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(_: Path, __: Path, name: str, *more: Any) -> None:
        assert name == convert_model("embedded", bits=4, plan=True).source
        raise KeyboardInterrupt

    monkeypatch.setattr("apertus_mlx.convert.distill.run.prepare", stop)
    with pytest.raises(KeyboardInterrupt):
        distill("embedded", model)


# --- what is refused


WRONG: list[tuple[Callable[..., Any], dict[str, Any], str]] = [
    (convert_model, {"source": 7}, "source: expected str or Path or None, not int"),
    (convert_model, {"source": b"x"}, "source: expected str or Path or None, not bytes"),
    (convert_model, {"out": ["x"]}, "out: expected"),
    (convert_model, {"bits": "4"}, "bits: expected int or None, not str"),
    (convert_model, {"bits": True}, "bits: expected int or None, not bool"),
    (convert_model, {"bits": 4.0}, "bits: expected int or None, not float"),
    (convert_model, {"target_bpw": [3]}, "target_bpw: expected"),
    (convert_model, {"target_size": 3.5}, "target_size: expected"),
    (convert_model, {"set": "*.down_proj=6"}, "set: expected"),
    (convert_model, {"set": [6]}, "set: expected str, not int"),
    (convert_model, {"smooth": 1}, "smooth: expected bool, not int"),
    (convert_model, {"calibration": 1}, "calibration: expected"),
    (convert_model, {"calibration": [1]}, "calibration: expected"),
    (convert_model, {"method": None}, "method: expected str, not NoneType"),
    (convert_model, {"dtype": 16}, "dtype: expected str or None, not int"),
    *(
        (call, {"progress": 5, **needed}, "^progress: expected function or None, not int")
        for call, needed in (
            (convert_model, {}),
            (plan, {}),
            (evaluate, {"models": "x", "reference": "x"}),
            (distill, {"teacher": "x", "student": "y"}),
        )
    ),
    (plan, {"model": 7}, "model: expected"),
    (plan, {"context": "9"}, "context: expected int or None, not str"),
    (plan, {"kv_rotate": 1}, "kv_rotate: expected bool or None, not int"),
    (plan, {"offline": "no"}, "offline: expected bool, not str"),
    (verify, {"directory": None}, "directory: expected Path or str, not NoneType"),
    (evaluate, {"models": None, "reference": "x"}, "models: expected|models: give"),
    (evaluate, {"models": [7], "reference": "x"}, "models: expected str or Path, not int"),
    (evaluate, {"models": "x", "reference": 7}, "reference: expected"),
    (
        evaluate,
        {"models": "x", "reference": "y", "tokens": 2.5},
        "tokens: expected int or None, not float",
    ),
    (distill, {"teacher": 7, "student": "x"}, "teacher: expected"),
    (distill, {"teacher": "x", "student": None}, "student: expected"),
    (distill, {"teacher": "x", "student": "y", "epochs": "2"}, "epochs: expected int, not str"),
    (distill, {"teacher": "x", "student": "y", "text_share": "1"}, "text_share: expected"),
]


@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize(("call", "arguments", "said"), WRONG)
def test_wrong_types(call: Callable[..., Any], arguments: dict[str, Any], said: str) -> None:
    with pytest.raises((TypeError, UsageError), match=said) as refused:
        call(**arguments)
    assert isinstance(refused.value, TypeError) or arguments.get("models", 0) is None


REFUSED: list[tuple[Callable[..., Any], dict[str, Any], type[ApertusError], str]] = [
    (convert_model, {"bits": 7}, UsageError, "--bits 7: expected 2, 3, 4, 5, 6 or 8"),
    (convert_model, {"bits": 4, "group_size": 48}, UsageError, "--group-size 48: expected 32"),
    (convert_model, {"method": "awq"}, UsageError, "expected rtn, search, gptq or best"),
    (convert_model, {"dtype": "int8"}, UsageError, "--dtype 'int8': expected bfloat16"),
    (convert_model, {"bits": 4, "target_bpw": 3}, UsageError, "leave out --bits"),
    (convert_model, {"target_bpw": float("nan")}, UsageError, "expected a number"),
    (convert_model, {"target_size": -5}, UsageError, "expected a size"),
    (convert_model, {"set": ["x"]}, UsageError, "PATTERN=BITS"),
    (convert_model, {"bits": 4, "device": "1MB", "plan": True}, ResourceError, "for the process"),
    (convert_model, {"bits": 4, "calibration": "x"}, UsageError, "only --method gptq"),
    (convert_model, {"source": "nowhere"}, NotFoundError, "no such folder"),
    (convert_model, {"source": ""}, UsageError, "--source: is empty"),
    (convert_model, {"out": "a\0b", "bits": 4}, UsageError, "a NUL character"),
    (distill, {"teacher": "a\0b", "student": "y"}, ApertusError, "no such folder"),
    (verify, {"directory": ""}, UsageError, "--directory: is empty"),
    (verify, {"directory": __file__}, NotFoundError, "is a file; give its folder"),
    (evaluate, {"models": "x", "reference": "x", "text": ""}, UsageError, "--text: is empty"),
    (evaluate, {"models": ["x", ""], "reference": "x"}, UsageError, "--models: is empty"),
    (plan, {"model": "nowhere"}, NotFoundError, "no such folder"),
    (plan, {"context": 0}, UsageError, "--context 0: expected 1 to"),
    (plan, {"device": "iphone-99"}, UsageError, "is no known device"),
    (plan, {"kv_bits": 5}, UsageError, "--kv-bits"),
    (verify, {"directory": "nowhere"}, NotFoundError, "no such folder"),
    (evaluate, {"models": [], "reference": "x"}, UsageError, "give at least one"),
    (evaluate, {"models": ["x", "x"], "reference": "x"}, UsageError, "given twice"),
    (evaluate, {"models": "nowhere", "reference": "x"}, NotFoundError, "no such folder"),
    (evaluate, {"models": "x", "reference": "x", "tokens": 1}, UsageError, "--tokens 1: expected"),
    (distill, {"teacher": "nowhere", "student": "x"}, NotFoundError, "no such folder"),
    (distill, {"teacher": "x", "student": "y", "train": "all"}, UsageError, "--train 'all'"),
    (distill, {"teacher": "x", "student": "y", "epochs": 0}, UsageError, "--epochs 0: expected"),
    (distill, {"teacher": "x", "student": "y", "text_share": 2}, UsageError, "--text-share"),
    (distill, {"teacher": "x", "student": "y", "learning_rate": 0}, UsageError, "--learning-rate"),
]  # fmt: skip


@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize(("call", "arguments", "kind", "said"), REFUSED)
def test_errors_are_the_packages_own(
    call: Callable[..., Any],
    arguments: dict[str, Any],
    kind: type[ApertusError],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(kind, match=said):
        call(**arguments)
    assert not list(tmp_path.iterdir())


def test_an_output_that_is_taken(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="is not empty"):
        convert_model(source, tmp_path / "out", bits=4)
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


def test_what_the_system_refuses_is_an_error_of_ours(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a name that can be used"):
        verify(tmp_path / ("x" * 300))
    with pytest.raises(ApertusError):
        convert_model(source, tmp_path / ("x" * 300), bits=4)


# --- the command's own


def test_the_output_folder_by_option_or_by_position(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert command(capsys, "convert", source, first, "--bits", "4")["output"] == str(first)
    assert command(capsys, "convert", source, "--out", second, "--bits", "4")["output"] == str(
        second
    )
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
    third = tmp_path / "third"
    with pytest.raises(UsageError, match=r"--out .*third.* twice"):
        command(capsys, "convert", source, tmp_path / "fourth", "--out", third, "--bits", "4")
    assert not third.exists() and not (tmp_path / "fourth").exists()
