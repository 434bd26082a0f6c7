"""Every benchmark that README and docs name runs, on little, and prints what it says it prints."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import draw_quantizers
from tests.docs.pages import GENERATED, PAGES, read
from tests.house.test_house import ROOT

# Arguments with which each is done in a minute or two: {model} is a folder of MLX weights in 4
# bits, {new} a name in an empty folder.
SHORT = {
    "activation": "--rows 1 --columns 64",
    "allocation_cost": "--bits 3 --rounds 1 --documents 60 --model apertus_mlx/hub/demo/model",
    "assignment_search": "--bits 2 --iterations 20 --rows 32",
    "batching": "{model} --rows 2 1 --rounds 1 --steps 2 --prompt-tokens 2",
    "calibration_cost": "{new} --size tiny --layers 1 --tokens 512",
    "convert_memory": "{new} --sizes 0.5B --repeats 1 --no-mlx-lm 0.5B",
    "cpu_memory": "{model} --prompt-tokens 32 --forms full",
    "decode_estimates": "",
    "distillation": "--bits 3 --tokens 1024 --epochs 1",
    "distillation_memory": "tiny --steps 1",
    "draft_distillation": "--questions 6 --judged 2 --epochs 1",
    "embedding_rows": "--sizes 1.5B --tokens 20",
    "fit_layer": "--size tiny --tokens 64 --no-mlx-lm",
    "generation": "{model} --rounds 1 --prompt-tokens 8",
    "kv_quality": "--tokens 2048 --few",
    "make_checkpoint": "0.5B {new}",
    "on_a_gpu": "{new} --sizes tiny --contexts 512 --tokens 512 --prompt-tokens 16"
    " --new-tokens 4 --rounds 1",
    "poison_requests": "--count 1000",
    "rank_bytes": "",
    "rank_deaths": "--rounds 1 --tokens 8",
    "rank_memory": "tiny --pipeline",
    "serve_load": "--seconds 20 --clients 4",
    "serve_peers": "{model} --clients 1 2 --requests 1 --rounds 1 --max-tokens 4",
    "small_vocabulary": "apertus_mlx/hub/demo/model --vocab 1024 --tokens 4 --rounds 1",
    "speculation": "--estimates",
    "speculation_speed": "--model tiny --draft tiny --tokens 8 --rounds 1 --right 0.8 --ahead 2",
    "structured_cost": "--rounds 1 --tokens 4",
    "vocabulary_healing": "--tokens 1024",
}
# Run by other tests, two of them by the last ones here.
ELSEWHERE = {
    "draw_quantizers", "kernels_on_cuda", "neighbours", "record_chat", "released_models", "witness",
}  # fmt: skip
COMPARED = {"embedded_exam", "quantizers"}
# Takes many minutes, and llama.cpp: its arguments are read.
ONLY_READ = {"cpu_speed"}
linux = pytest.mark.skipif(sys.platform != "linux", reason="figures of pages are of Linux")


def named() -> set[str]:
    """The benchmarks that pages name."""
    texts = [" ".join(read(page).split()) for page in PAGES if page not in GENERATED]
    return {name for text in texts for name in re.findall(r"python -m benchmarks\.(\w+)", text)}


def test_each_that_a_page_names_is_run() -> None:
    assert named() - set(SHORT) == ELSEWHERE | COMPARED | ONLY_READ


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "4bit"
    run("apertus_mlx", "convert", "--bits", "4", "--out", str(folder))
    return folder


def run(module: str, *arguments: str) -> str:
    """What a module prints."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], cwd=ROOT, capture_output=True, text=True,
        check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@linux
@pytest.mark.nightly
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", SHORT)
def test_it_runs(name: str, model: Path, tmp_path: Path) -> None:
    words = SHORT[name].format(model=model, new=tmp_path / "new").split()
    printed = run(f"benchmarks.{name}", *words)
    assert name == "make_checkpoint" or re.search(r"\d", printed)


@linux
@pytest.mark.nightly
def test_the_exam_gives_the_figures_of_the_page() -> None:
    """Nothing in it is drawn by chance; another processor may round an answer differently."""
    page = read("docs/quantizers.md")
    for found in json.loads(run("benchmarks.embedded_exam", "--bits", "4", "--json")):
        row = f"| {found['weights']} | {found['weights_bytes']:,} | "
        [right] = re.findall(rf"^{re.escape(row)}(\d+) \|$", page, re.MULTILINE)
        assert abs(int(right) - found["right"]) <= 1


@linux
@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_quantizers_without_text_give_the_figures_of_the_page(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    methods = ["mlx-lm rtn", "search"]
    run(
        "benchmarks.quantizers", "--bits", "4", "--models", "embedded",
        "--methods", *methods, "--json", str(file),
    )  # fmt: skip
    found = {each["method"]: each for each in json.loads(file.read_text("utf-8"))["results"]}
    page = draw_quantizers.rows(read("docs/quantizers.md"))
    [row] = [each for each in page if each["bits"] == "4"]
    for method, column in zip(methods, ("mlx-lm, rounded", "search"), strict=True):
        assert f"{found[method]['bytes']:,}" == row["bytes"]
        assert found[method]["kl_mean"] == pytest.approx(float(row[column]), rel=0.02)
