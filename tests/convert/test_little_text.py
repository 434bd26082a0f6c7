"""Calibration on little text: the better codes are kept, and what was done is said."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest

from apertus_mlx.cli.app import app
from apertus_mlx.convert.evaluation import little_text
from apertus_mlx.convert.evaluation.evaluate import measure
from apertus_mlx.convert.evaluation.texts import hold_out, read_texts
from apertus_mlx.convert.job import convert, prepare
from apertus_mlx.convert.plan.policy import Request
from apertus_mlx.convert.write.manifest import MANIFEST
from apertus_mlx.quant.spec import QuantSpec
from tests.builders import config_4x, write_checkpoint


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "source", config_4x(), dtype=mx.bfloat16)


def test_the_better_of_the_two_is_kept(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the divergences of both, measured from their folders."""
    text = tmp_path / "en.txt"
    text.write_text("\n\n".join(f"Bird {n} sings by the sea today, {n * 7}." for n in range(12)))
    judged = hold_out(read_texts([text]))[1]
    requests = {m: Request(QuantSpec(2, 32), method=m) for m in ("search", "gptq")}
    kept = prepare(
        source, requests["gptq"], "source", calibration_texts=[text], target=tmp_path / "kept"
    )
    monkeypatch.setattr(little_text, "ENOUGH_TOKENS", 1)
    divergences = {}
    for method, request in requests.items():
        job = prepare(source, request, "source", calibration_texts=[text])
        assert job.plan.request.method == method
        folder = convert(job, tmp_path / method)
        divergences[method] = measure(folder, source, judged).overall.kl_mean
    assert kept.plan.request.method == min(divergences, key=lambda m: divergences[m])
    (note,) = [note for note in kept.plan.notes if "tokens are little" in note]
    figures = note.split("mean divergence is ")[1].replace(":", ",").split(", without texts ")
    said = [float(figures[0]), float(figures[1].split(",")[0])]
    # The evaluation's windows are those of one document each, the judge's span documents.
    assert said == pytest.approx([divergences["gptq"], divergences["search"]], rel=0.5)


@pytest.mark.parametrize(
    "options", [["--method", "gptq"], ["--method", "gptq", "--smooth"], ["--smooth"]]
)
def test_one_character_calibrates_nothing(
    source: Path, tmp_path: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "en.txt"
    text.write_text("a")
    command = ["convert", str(source), str(tmp_path / "out"), "--bits", "2", "--group-size", "32",
               "--calibration", str(text), "--json", *options]  # fmt: skip
    app(command, standalone_mode=False)
    printed = capsys.readouterr()
    said = "en.txt: 2 tokens, of which no part could be held out to judge by; not calibrated"
    assert said in printed.err
    assert any(said in note for note in json.loads(printed.out)["notes"])
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert manifest["method"] == ("search" if "gptq" in options else "rtn")
    assert "too short to hold a part out" in manifest["quality"]["text"]["name"]
    assert "too short to hold a part out" in (tmp_path / "out" / "README.md").read_text()
    method = manifest["method"]
    plain = convert(
        prepare(source, replace(Request(QuantSpec(2, 32)), method=method), "source"),
        tmp_path / "plain",
    )
    files = [(folder / "model.safetensors").read_bytes() for folder in (plain, tmp_path / "out")]
    assert files[0] == files[1]
