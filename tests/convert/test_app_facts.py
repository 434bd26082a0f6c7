"""What a manifest says to an app: the config's numbers, and those from which `plan` computes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from apertus_mlx.checkpoint.inventory import take_inventory
from apertus_mlx.convert.check.app_support import PATTERN
from apertus_mlx.convert.check.verify import verify
from apertus_mlx.convert.job import convert, prepare
from apertus_mlx.convert.plan.policy import Request
from apertus_mlx.hub.demo import model_dir
from apertus_mlx.memory.devices import Device
from apertus_mlx.memory.report import plan_for_device
from apertus_mlx.quant.spec import QuantSpec
from tests import convert_builders as build
from tests.chat_templates import FAMILIES

SWIFT = Path(__file__).parents[2] / "swift/Sources/ApertusCore"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("facts") / "out"
    return convert(prepare(model_dir(), Request(QuantSpec(4, 64)), "x"), target)


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_facts_of_a_converted_folder(folder: Path) -> None:
    manifest, config = (
        read(folder / name) for name in ("apertus_mlx_manifest.json", "config.json")
    )
    said = dict(manifest["architecture"])
    sizes = sum(
        len(tensor.data) // build.SIZES[tensor.dtype]
        for name, tensor in build.read_folder(model_dir()).items()
        if name.endswith(".weight")
    )
    assert said.pop("parameters") == sizes == manifest["parameters"]
    assert said.pop("head_dim") == config["hidden_size"] // config["num_attention_heads"]
    assert said.pop("output_vocab_size") == config["vocab_size"]
    assert said == {key: config[key] for key in said}
    assert manifest["chat_template"] == "v1"
    assert manifest["default_system"] == ""


def test_memory_terms_are_those_of_the_plan(folder: Path) -> None:
    """The working memory of one token, computed from the manifest's terms alone."""
    manifest = read(folder / "apertus_mlx_manifest.json")
    terms, shape = manifest["memory"], manifest["architecture"]
    plan = plan_for_device(
        take_inventory(folder),
        Device("x", 10**9),
        context=300,
        form=None,
        prefill_step=1,
        on_gpu=True,
    )
    assert terms["compute_bytes"] == plan.compute_bytes
    widths = terms["kv_bytes_per_token"]
    assert [widths[form.form.split()[0].replace("full", "16")] for form in plan.forms] == [
        form.kv_bytes_per_token for form in plan.forms
    ]
    assert {form.weights_bytes for form in plan.forms} == {terms["weights_bytes"]}
    mlp = terms["compute_bytes"] * shape["intermediate_size"]
    working = terms["mlp"] * mlp + 1.1 * mlp
    working += terms["residual"] * terms["compute_bytes"] * shape["hidden_size"]
    assert plan.forms[0].prefill_bytes == int(working) + terms["fixed_bytes"]


def support(directory: Path) -> dict[str, str]:
    found = verify(directory).findings
    return {f.where: f.text for f in found if f.where in ("ApertusKit", "mlx-swift-lm")}


def test_a_folder_that_apps_can_run(folder: Path) -> None:
    assert verify(folder).findings == ()


def change(folder: Path, target: Path, **config: Any) -> Path:
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    build.write_json(target / "config.json", {**read(folder / "config.json"), **config})
    return target


def test_what_apps_cannot_run_is_said(folder: Path, tmp_path: Path) -> None:
    spelled = change(folder, tmp_path / "a", rope_theta=None,
                     rope_parameters={"rope_theta": 500000.0})  # fmt: skip
    assert list(support(spelled)) == ["mlx-swift-lm"]
    assert "rope_theta" in support(spelled)["mlx-swift-lm"]
    template = change(folder, tmp_path / "b")
    (template / "chat_template.jinja").write_text(FAMILIES["v1.5"][0], encoding="utf-8")
    assert list(support(template)) == ["ApertusKit"]
    assert "no form of v1 or v1.1" in support(template)["ApertusKit"]
    tokenizer = change(folder, tmp_path / "c")
    values = read(tokenizer / "tokenizer.json")
    values["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\s+"
    build.write_json(tokenizer / "tokenizer.json", values)
    assert "cuts texts otherwise" in support(tokenizer)["ApertusKit"]
    source = build.write_checkpoint(tmp_path / "in", build.config(head_dim=64))
    wide = convert(prepare(source, Request(None), "x"), tmp_path / "wide")
    assert "head_dim" in support(wide)["mlx-swift-lm"]


def test_the_pattern_is_that_of_the_tokenizers_and_of_swift() -> None:
    steps = read(model_dir() / "tokenizer.json")["pre_tokenizer"]["pretokenizers"]
    assert steps[0]["pattern"]["Regex"] == PATTERN
    lines = re.findall(r'#"(.*)"#', (SWIFT / "Pieces.swift").read_text(encoding="utf-8"))
    assert "".join(lines[:3]) == PATTERN
