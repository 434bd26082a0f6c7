"""`convert --method`: other codes in the same format, at the same bytes, with an evaluation."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from apertus_mlx.backend.mlx import load_model
from apertus_mlx.cli.app import app
from apertus_mlx.convert.check.verify import verify
from apertus_mlx.convert.job import convert, prepare
from apertus_mlx.convert.plan.policy import Request
from apertus_mlx.convert.write.manifest import MANIFEST
from apertus_mlx.errors import ApertusError, UsageError
from apertus_mlx.quant.spec import QuantSpec
from apertus_mlx.text.tokenizer import Tokenizer
from tests.builders import config_4x, write_checkpoint


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "source", config_4x(), dtype=mx.bfloat16)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "en.txt"
    lines = [f"Line {n} has {n * n} birds, and the sea is calm today." for n in range(120)]
    path.write_text("\n\n".join(lines))
    return path


def run(source: Path, target: Path, method: str, texts: Path, bits: int = 2) -> Path:
    request = Request(QuantSpec(bits, 32), method=method)
    return convert(prepare(source, request, "source", calibration_texts=[texts]), target)


def distance(model: Path, source: Path, texts: Path) -> float:
    """Squared error of logits on a text of the same letters, by the runtime's own forward pass."""
    tokenizer = Tokenizer.load(source, vocab_size=384, bos_token_id=1)
    ids = mx.array([[1, *tokenizer.encode(texts.read_text()[::-1][:400])]])
    logits = [np.array(load_model(folder, "float32")(ids)) for folder in (model, source)]
    return float(np.square(logits[0] - logits[1]).mean())


@pytest.mark.nightly
def test_methods_differ_in_codes_alone(source: Path, texts: Path, tmp_path: Path) -> None:
    methods = ("rtn", "search", "gptq")
    models = {method: run(source, tmp_path / method, method, texts) for method in methods}
    data = {m: (models[m] / "model.safetensors").read_bytes() for m in methods}
    configs = {(models[m] / "config.json").read_bytes() for m in methods}
    headers = {d[: 8 + int.from_bytes(d[:8], "little")] for d in data.values()}
    assert len(configs) == len(headers) == 1
    assert len({len(d) for d in data.values()}) == 1
    assert len(set(data.values())) == 3
    errors = [distance(models[method], source, texts) for method in methods]
    assert errors[0] > 1.2 * errors[1]
    assert errors[1] > 1.2 * errors[2]
    for model in models.values():
        assert not verify(model).errors


@pytest.mark.nightly
def test_manifest_and_card_have_the_receipt(source: Path, texts: Path, tmp_path: Path) -> None:
    manifests = {}
    for method in ("search", "gptq"):
        model = run(source, tmp_path / method, method, texts)
        manifests[method] = json.loads((model / MANIFEST).read_text())
        assert manifests[method]["method"] == method
        assert f"| Method | {method} |" in (model / "README.md").read_text()
        assert not list(model.glob(".*"))
    assert manifests["search"]["quality"] is None
    assert manifests["search"]["calibration"] is None
    calibration = manifests["gptq"]["calibration"]
    assert calibration["text"] == "en.txt" and calibration["seed"] == 0
    quality = manifests["gptq"]["quality"]
    assert quality["text"]["name"] == "en.txt, held out"
    assert quality["overall"]["kl_mean"] > quality["noise_floor"]["kl_mean"]
    card = (tmp_path / "gptq" / "README.md").read_text()
    assert f"| en | {quality['languages']['en']['tokens']} |" in card


@pytest.mark.nightly
def test_calibration_is_repeatable(source: Path, texts: Path, tmp_path: Path) -> None:
    first, second = (run(source, tmp_path / name, "gptq", texts) for name in ("a", "b"))
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


@pytest.mark.nightly
def test_an_interrupted_run_goes_on(
    source: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Codes that are done are not made again, and the result is the same."""
    whole = run(source, tmp_path / "whole", "gptq", texts)
    request = Request(QuantSpec(2, 32), method="gptq")
    job = prepare(source, request, "source", calibration_texts=[texts])

    def interrupt(done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(job, tmp_path / "torn", progress=interrupt)
    monkeypatch.setattr("apertus_mlx.convert.calibration.calibrated.quantize_model", None)
    resumed = convert(job, tmp_path / "torn", resume=True)
    assert (resumed / "model.safetensors").read_bytes() == (
        whole / "model.safetensors"
    ).read_bytes()


@pytest.mark.nightly
def test_other_texts_are_another_conversion(source: Path, texts: Path, tmp_path: Path) -> None:
    request = Request(QuantSpec(2, 32), method="gptq")

    def interrupt(done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(prepare(source, request, "s", calibration_texts=[texts]), tmp_path / "x",
                progress=interrupt)  # fmt: skip
    with pytest.raises(UsageError, match="other options"):
        convert(prepare(source, request, "s"), tmp_path / "x", resume=True)


def test_mlx_lm_runs_the_result(source: Path, texts: Path, tmp_path: Path) -> None:
    utils = pytest.importorskip("mlx_lm.utils")
    model = run(source, tmp_path / "model", "gptq", texts, bits=3)
    theirs, _ = utils.load_model(model)
    theirs.set_dtype(mx.float32)
    ids = mx.array([[1, 100, 200, 300]])
    expected = np.array(load_model(model, "float32")(ids))
    assert np.allclose(np.array(theirs(ids)), expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "awq", "--bits", "4"], "rtn, search, gptq or best"),
        (["--method", "gptq"], "--bits"),
        (["--method", "search", "--mode", "mxfp4"], "for affine"),
        (["--bits", "4", "--calibration", "x.txt"], "only --method gptq"),
        (["--bits", "4", "--method", "gptq", "--calibration", "x.txt"], "no such file"),
    ],
)
def test_requests_that_make_no_sense(
    source: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    with pytest.raises(ApertusError, match=message):
        app(["convert", str(source), str(tmp_path / "out"), *options], standalone_mode=False)
    assert not (tmp_path / "out").exists()


def test_plan_names_the_method(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["convert", str(source), "--bits", "4", "--method", "gptq", "--plan"]
    app(command, standalone_mode=False)
    assert "quantize, gptq" in capsys.readouterr().out
    app([*command, "--json"], standalone_mode=False)
    assert '"method": "gptq"' in capsys.readouterr().out
