"""docs/file-formats.md lists the keys of what a conversion and a prompt cache really hold."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from apertus_mlx import convert_model
from apertus_mlx.cli.app import app
from apertus_mlx.convert.write.golden_answers import write_golden_answers
from apertus_mlx.hub.demo import model_dir
from tests.docs.markdown import code_column
from tests.house.test_house import ROOT

PAGE = ROOT / "docs" / "file-formats.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demonstration model in 4 bits, with an embedding of 6."""
    out = tmp_path_factory.mktemp("converted") / "out"
    convert_model(model_dir(), out, bits=4, embed_bits=6)
    return out


def read(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def listed(heading: str) -> set[str]:
    keys = code_column(PAGE, heading)
    assert keys and len(keys) == len(set(keys))
    return set(keys)


def test_files(folder: Path) -> None:
    assert listed("Converted folder") == {path.name for path in folder.iterdir()}


def test_config(folder: Path) -> None:
    block = read(folder / "config.json")["quantization"]
    own = {key: value for key, value in block.items() if not isinstance(value, dict)}
    assert own.keys() == block["model.embed_tokens"].keys() == listed("Mixed bits")


@pytest.mark.parametrize(
    ("heading", "key"),
    [("Manifest", None), ("Shape", "architecture"), ("Memory terms", "memory")],
)
def test_manifest(folder: Path, heading: str, key: str | None) -> None:
    manifest = read(folder / "apertus_mlx_manifest.json")
    assert listed(heading) == set(manifest if key is None else manifest[key])


def test_golden_prompts(folder: Path) -> None:
    assert listed("Golden prompts") == set(read(folder / "apertus_mlx_golden_prompts.json"))


@pytest.mark.nightly
def test_golden_answers(folder: Path) -> None:
    write_golden_answers(folder)
    assert listed("Golden answers") == set(read(folder / "apertus_mlx_golden_answers.json"))


def test_vocabulary_table(folder: Path) -> None:
    data = (folder / "apertus_mlx_tokenizer.bin").read_bytes()
    _, _, _, size = struct.unpack_from("<8s32sII", data)
    header = json.loads(data[48 : 48 + size])
    assert listed("Header of the table") == set(header)
    numbers = {"M": header["merges"], "V": header["sorted"], "N": header["tokens"]}
    fixed = sum(numbers[each] for each in "MMVN") * 4 + 4 + numbers["M"] * 8
    tokens = data[48 + size + fixed :]
    (end,) = struct.unpack_from("<I", data, 48 + size + fixed - 4)
    assert len(tokens) == end


def test_prompt_cache(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    app(["generate", "hi", "-n", "1", "--prompt-cache", str(path)], standalone_mode=False)
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert listed("Prompt cache") == set(header["__metadata__"])
