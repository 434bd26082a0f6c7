"""`verify`: damage is found, and what a Swift app would trip over is said."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from apertus_mlx.convert.check.app_support import KIT
from apertus_mlx.convert.check.verify import verify
from apertus_mlx.convert.job import convert, prepare
from apertus_mlx.convert.plan.policy import Request, Rule
from apertus_mlx.errors import NotFoundError
from apertus_mlx.quant.spec import QuantSpec
from tests import convert_builders as build

REQUEST = Request(QuantSpec(4, 64), (Rule("model.embed_tokens", QuantSpec(6, 64), "test"),))


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("converted")
    source = build.write_checkpoint(place / "in")
    return convert(prepare(source, REQUEST, "x"), place / "out")


@pytest.fixture
def folder(converted: Path, tmp_path: Path) -> Path:
    """A copy to do harm to."""
    return Path(shutil.copytree(converted, tmp_path / "out"))


def texts(directory: Path, *levels: str) -> list[str]:
    """The findings of these levels, or the errors; the builder's tokenizer is none of Apertus'."""
    return [
        f"{f.where}: {f.text}"
        for f in verify(directory).findings
        if f.level in (levels or ("error",)) and f.where != KIT
    ]


def edit(path: Path, **changes: Any) -> None:
    values = json.loads(path.read_text())
    values.update(changes)
    build.write_json(path, {k: v for k, v in values.items() if v is not build.REMOVED})


def resign(directory: Path) -> None:
    """Make the manifest agree with whatever is in the folder now."""
    from apertus_mlx.convert.write.manifest import MANIFEST, make_manifest

    values = json.loads((directory / MANIFEST).read_text())
    build.write_json(directory / MANIFEST, make_manifest(directory, {}, values))


def rewrite(directory: Path, change: Callable[[dict[str, build.Raw]], object]) -> None:
    tensors = build.read_folder(directory)
    change(tensors)
    build.write_safetensors(directory / "model.safetensors", tensors)
    index = {"weight_map": dict.fromkeys(tensors, "model.safetensors")}
    build.write_json(directory / "model.safetensors.index.json", index)
    resign(directory)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rope", ["default", "llama3"])
@pytest.mark.parametrize("spec", [None, QuantSpec(2, 32), QuantSpec(8, 32, "mxfp8")], ids=str)
def test_what_convert_writes_has_no_findings(
    tmp_path: Path, tied: bool, rope: str, spec: QuantSpec | None
) -> None:
    scaling = {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4,
               "original_max_position_embeddings": 8192}  # fmt: skip
    values = build.config(
        tie_word_embeddings=tied, rope_scaling=scaling if rope == "llama3" else None
    )
    source = build.write_checkpoint(tmp_path / "in", values)
    convert(prepare(source, Request(spec), "x"), tmp_path / "out")
    assert texts(tmp_path / "out", "error", "warning") == []


def test_damage_is_found(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    (folder / "tokenizer.json").unlink()
    (folder / "generation_config.json").write_text("{}")
    found = " ".join(texts(folder))
    assert "model.safetensors: was changed" in found
    assert "tokenizer.json: is missing" in found
    assert "generation_config.json: has 2 bytes" in found


def test_other_weights_below_the_folder_are_an_error(folder: Path) -> None:
    (folder / "adapters").mkdir()
    build.write_safetensors(folder / "adapters" / "a.safetensors", {})
    (folder / "notes.md").write_text("x")
    assert any("adapters/a.safetensors" in text for text in texts(folder))
    assert texts(folder, "warning") == ["notes.md: is not in the manifest"]


@pytest.mark.parametrize(
    "content",
    ["", "[]", '{"format_version": 2}', '{"format_version": 1, "files": {}}',
     '{"format_version": 1, "files": {"../x": {"size_bytes": 1, "sha256": "0"}}}',
     '{"format_version": 1, "files": {"x": {"size_bytes": 1, "sha256": "0"}}}',
     '{"format_version": 1, "files": {"x": {"size_bytes": -1, "sha256": "' + "0" * 64 + '"}}}'],
)  # fmt: skip
def test_a_damaged_manifest_is_an_error(folder: Path, content: str) -> None:
    (folder / "apertus_mlx_manifest.json").write_text(content)
    assert any("manifest" in text for text in texts(folder))


def test_a_folder_without_a_manifest_is_still_looked_at(folder: Path) -> None:
    (folder / "apertus_mlx_manifest.json").unlink()
    assert len(texts(folder)) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_theta": build.REMOVED}, "1000000.0"),
        ({"tie_word_embeddings": build.REMOVED}, "Swift takes it for true"),
        ({"num_attention_heads": "4"}, "num_attention_heads"),
        ({"quantization": {"group_size": 64, "bits": 4, "provenance": "x"}}, "provenance"),
        ({"quantization": {"group_size": 64, "bits": 7}}, "bits"),
    ],
)
def test_a_config_that_swift_reads_differently(
    folder: Path, changes: dict[str, Any], message: str
) -> None:
    edit(folder / "config.json", **changes)
    resign(folder)
    assert message in " ".join(texts(folder))


def test_transformers_5_keys_alone_are_not_enough(folder: Path) -> None:
    """Row 91: Swift would compute with its default theta and without scaling."""
    rope = {"rope_type": "llama3", "rope_theta": 12e6, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
    edit(folder / "config.json", rope_parameters=rope, rope_theta=build.REMOVED,
         rope_scaling=build.REMOVED)  # fmt: skip
    resign(folder)
    assert "the model means (12000000.0, 'llama3', 8.0)" in " ".join(texts(folder))


def test_alphas_as_mlx_lm_writes_them(folder: Path) -> None:
    name = "model.layers.0.mlp.act_fn.alpha_p"
    rewrite(folder, lambda t: t.update({name: build.raw(np.float32(0.2), "BF16")}))
    assert f"{name}: shape [], Swift expects [1]" in texts(folder)


def test_constants_that_are_absent(folder: Path) -> None:
    name = "model.layers.1.mlp.act_fn.beta"
    rewrite(folder, lambda t: t.pop(name))
    assert f"{name}: missing: Swift needs every parameter" in texts(folder)


def test_missing_tensors(folder: Path) -> None:
    rewrite(folder, lambda t: t.pop("model.norm.weight"))
    assert "missing tensor model.norm.weight" in " ".join(texts(folder))


def test_superfluous_tensors(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({"lm_head.extra": build.raw(np.zeros(2), "F32")}))
    assert "unexpected tensor lm_head.extra" in " ".join(texts(folder))


def test_what_swift_cannot_express_is_a_warning(tmp_path: Path) -> None:
    source = build.write_checkpoint(tmp_path / "in", build.config(head_dim=64))
    convert(prepare(source, REQUEST, "x"), tmp_path / "out")
    assert texts(tmp_path / "out") == []
    assert "head_dim" in " ".join(texts(tmp_path / "out", "warning"))


def test_tokenizer_keys_that_swift_needs(tmp_path: Path) -> None:
    source = build.write_checkpoint(tmp_path / "in")
    edit(source / "tokenizer_config.json", tokenizer_class=build.REMOVED,
         clean_up_tokenization_spaces=build.REMOVED, model_max_length=1e30)  # fmt: skip
    (source / "chat_template.jinja").write_text("{% include 'x' %}")
    convert(prepare(source, REQUEST, "x"), tmp_path / "out")
    found = " ".join(texts(tmp_path / "out", "warning"))
    for word in ("tokenizer_class", "clean_up_tokenization_spaces", "model_max_length", "include"):
        assert word in found
    assert texts(tmp_path / "out") == []


def test_what_was_fetched_from_the_hub_is_no_damage(folder: Path, tmp_path: Path) -> None:
    """In the Hub client's cache every file of a folder is a link to its content."""
    repository = tmp_path / "models--a--b"
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for path in folder.iterdir():
        blob = path.rename(repository / "blobs" / path.name.encode().hex())
        (snapshot / path.name).symlink_to(f"../../blobs/{blob.name}")
    assert texts(snapshot) == []


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        verify(tmp_path / "missing")
