"""Golden prompts in converted folders: other implementations come to the same ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from apertus_mlx.convert.check.verify import verify
from apertus_mlx.convert.job import convert, prepare
from apertus_mlx.convert.plan.policy import Request
from apertus_mlx.convert.write.golden import CONVERSATIONS, GOLDEN, TEXTS
from apertus_mlx.convert.write.manifest import MANIFEST, make_manifest
from apertus_mlx.hub.demo import model_dir
from apertus_mlx.quant.spec import QuantSpec


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("golden") / "out"
    return convert(prepare(model_dir(), Request(QuantSpec(4, 64)), "embedded"), target)


@pytest.fixture(scope="module")
def golden(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / GOLDEN).read_text(encoding="utf-8"))
    return values


def test_texts_as_the_tokenizers_library_has_them(folder: Path, golden: dict[str, Any]) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert [entry["text"] for entry in golden["texts"]] == list(TEXTS)
    for entry in golden["texts"]:
        ids = tokenizer.encode(entry["text"], add_special_tokens=False).ids
        assert entry["token_ids"] == ids


def test_conversations_as_transformers_has_them(folder: Path, golden: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert {entry["name"] for entry in golden["conversations"]} <= CONVERSATIONS.keys()
    assert len(golden["conversations"]) >= 3
    for entry in golden["conversations"]:
        ids = tokenizer.apply_chat_template(
            entry["messages"],
            add_generation_prompt=True,
            enable_thinking=entry["enable_thinking"],
            return_dict=False,
        )
        assert entry["token_ids"] == ids, entry["name"]


def test_verify_compares_them(folder: Path, golden: dict[str, Any]) -> None:
    assert not verify(folder).errors
    path, manifest = folder / GOLDEN, folder / MANIFEST
    before = path.read_bytes(), manifest.read_bytes()
    try:
        golden["conversations"][0]["token_ids"][2] += 1
        golden["texts"] = []
        path.write_text(json.dumps(golden), encoding="utf-8")
        manifest.write_text(json.dumps(make_manifest(folder, {}, json.loads(before[1]))))
        errors = [f"{finding.where}: {finding.text}" for finding in verify(folder).errors]
        assert errors == [f"{GOLDEN}: 'question' has other token ids today"]
    finally:
        path.write_bytes(before[0])
        manifest.write_bytes(before[1])
