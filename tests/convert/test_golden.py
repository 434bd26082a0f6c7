"""Golden prompts in converted folders: other implementations come to the same ids."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from apertus_mlx.checkpoint.config import read_config
from apertus_mlx.convert.check.verify import verify
from apertus_mlx.convert.job import convert, prepare
from apertus_mlx.convert.plan.policy import Request
from apertus_mlx.convert.write.golden import (
    CONVERSATIONS,
    GOLDEN,
    TEXTS,
    TOOL_CONVERSATIONS,
    golden_prompts,
)
from apertus_mlx.convert.write.manifest import MANIFEST, make_manifest
from apertus_mlx.hub.demo import model_dir
from apertus_mlx.quant.spec import QuantSpec
from tests.chat_templates import FAMILIES, load_template

# The form in which a template takes thoughts and several results.
IN_BLOCKS = [
    {"role": "user", "content": "Wie ist das Wetter in Zürich, und wie spät ist es?"},
    {
        "role": "assistant",
        "content": {
            "blocks": [
                {"type": "thoughts", "text": "I need both tools."},
                {
                    "type": "tool_calls",
                    "calls": [
                        {"name": "get_weather", "arguments": '{"city": "Zürich"}'},
                        {"name": "get_time", "arguments": "{}"},
                    ],
                },
            ]
        },
    },
    {"role": "tool", "content": '{"temperature": 7}'},
    {"role": "tool", "content": "12:30"},
]


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
    names = [entry["name"] for entry in golden["conversations"]]
    assert names == [*CONVERSATIONS, *TOOL_CONVERSATIONS]
    for entry in golden["conversations"]:
        ids = tokenizer.apply_chat_template(
            IN_BLOCKS if entry["name"] == "thoughts and tool results" else entry["messages"],
            tools=entry.get("tools"),
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


@pytest.mark.parametrize(
    ("family", "left_out"),
    [("v1", []), ("v1.1", []), ("v1.5", ["thoughts and tool results"])],
)
def test_tools_for_every_family(family: str, left_out: list[str], tmp_path: Path) -> None:
    """Which of the conversations with tools a folder of each family has, and what they hold."""
    _, tokenizer = load_template(family, tmp_path)
    config = replace(read_config(model_dir()), vocab_size=tokenizer.vocab_size)
    shutil.copy(model_dir() / "tokenizer_config.json", tmp_path)
    (tmp_path / "chat_template.jinja").write_text(FAMILIES[family][0], encoding="utf-8")
    found = {each["name"]: each for each in golden_prompts(tmp_path, config)["conversations"]}
    assert [name for name in TOOL_CONVERSATIONS if name not in found] == left_out
    # Calls, and results in the order of the calls.
    text = tokenizer.decode(found["tool result"]["token_ids"])
    assert "type get_time = () => any;" in text and '{"get_weather": {"city": "Zürich"}}' in text
    if not left_out:
        text = tokenizer.decode(found["thoughts and tool results"]["token_ids"])
        assert 'I need both tools.[{"get_weather": {"city": "Zürich"}}, {"get_time": {}}]' in text
        assert '[{"temperature": 7}, 12:30]' in text
