"""Folders of weights: what is damaged, hostile or contradictory is refused before any array."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from apertus_mlx.backend.mlx import load_model
from apertus_mlx.checkpoint.inventory import take_inventory
from apertus_mlx.checkpoint.tensors import INDEX_FILE, open_checkpoint
from apertus_mlx.errors import NotFoundError, RejectedError
from tests.builders import config_4x, random_weights, write_checkpoint, write_json

CONFIG = config_4x(num_hidden_layers=1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", CONFIG, tokenizer=False)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", CONFIG, shards=2, tokenizer=False)


def refused(directory: Path, *named: str) -> None:
    with pytest.raises(RejectedError) as caught:
        take_inventory(directory)
    message = str(caught.value)
    assert "\n" not in message
    for text in named:
        assert text in message


def safetensors(
    header: bytes | dict[str, Any], data: bytes = b"", length: int | None = None
) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(dtype: str = "F32", shape: object = (1,), offsets: object = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


FOUR = b"\0" * 4
HOSTILE: dict[str, bytes] = {
    "empty file": b"",
    "seven bytes": b"\0" * 7,
    "header length 0": safetensors(b"{}", length=0),
    "header longer than the file": safetensors(b"{}", length=100),
    "header of 100 MB": safetensors(b"{}", length=100 * 2**20),
    "header length 2^63": safetensors(b"{}", length=2**63),
    "header is not UTF-8": safetensors(b'{"\xff\xfe":1}'),
    "header is not an object": safetensors(b"[1]"),
    "header starts with a blank": safetensors(b' {"a":1}'),
    "deep nesting": safetensors(b'{"a":' * 200_000 + b"1" + b"}" * 200_000),
    "negative dimension": safetensors({"a": entry(shape=[-1, -1])}, FOUR),
    "fractional dimension": safetensors({"a": entry(shape=[1.5])}, FOUR),
    "boolean dimension": safetensors({"a": entry(shape=[True])}, FOUR),
    "dimension of 2^31": safetensors({"a": entry("U8", [2**31], [0, 2**31])}, FOUR),
    "product beyond 2^64": safetensors({"a": entry(shape=[2**30, 2**30, 2**30])}, FOUR),
    "offsets wrap around": safetensors({"a": entry(offsets=[2**64 - 4, 2**64])}, FOUR),
    "negative offset": safetensors({"a": entry(offsets=[-4, 0])}, FOUR),
    "reversed offsets": safetensors({"a": entry(offsets=[4, 0])}, FOUR),
    "past the end": safetensors({"a": entry(shape=[2], offsets=[0, 8])}, FOUR),
    "overlap": safetensors({"a": entry(), "b": entry(shape=[2], offsets=[0, 8])}, FOUR * 2),
    "hole": safetensors({"a": entry(), "b": entry(offsets=[8, 12])}, FOUR * 3),
    "trailing bytes": safetensors({"a": entry()}, FOUR * 2),
    "shape and offsets disagree": safetensors({"a": entry(shape=[2])}, FOUR),
    "duplicate key": safetensors(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', FOUR),
    "unknown type": safetensors({"a": entry("F5")}, FOUR),
    "complex": safetensors({"a": entry("C64", [1], [0, 8])}, FOUR * 2),
    "extra field": safetensors({"a": {**entry(), "x": 1}}, FOUR),
    "missing field": safetensors({"a": {"dtype": "F32", "shape": [1]}}, FOUR),
    "git lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
    "zip archive": b"PK\x03\x04" + b"\0" * 60,
    "long name": safetensors({"a" * 10_000: entry()}, FOUR),
    "no tensors": safetensors({}),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files(name: str, folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(HOSTILE[name])
    refused(folder, "model")


def test_too_many_tensors(folder: Path) -> None:
    header = dict.fromkeys(f"t{i}" for i in range(100_001))
    (folder / "model.safetensors").write_bytes(safetensors(header))
    refused(folder, "100001 tensors")


def test_truncated_file(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    refused(folder, "truncated")


def test_folders_without_weights(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        take_inventory(tmp_path / "absent")
    refused(tmp_path, "no config.json and no *.safetensors")
    write_json(tmp_path / "config.json", CONFIG)
    refused(tmp_path, "no *.safetensors")
    for name in ("pytorch_model.bin", "model.gguf", "weights.npz"):
        (tmp_path / name).write_bytes(b"PK\x03\x04")
        refused(tmp_path, name, "safetensors version")
        (tmp_path / name).unlink()


def edit_index(directory: Path, change: Callable[[dict[str, str]], object]) -> None:
    path = directory / INDEX_FILE
    index = json.loads(path.read_text())
    change(index["weight_map"])
    write_json(path, index)


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    "file",
    [
        "../model.safetensors", "/etc/passwd.safetensors", "C:\\x.safetensors",
        "\\\\host\\x.safetensors", "a/b.safetensors", "x\0.safetensors", ".safetensors",
        "model.bin", ".hidden.safetensors", "\u202eevil.safetensors",
        "x" * 300 + ".safetensors", 5, None, "",
    ],
)  # fmt: skip
def test_index_points_outside(file: object, sharded: Path) -> None:
    edit_index(sharded, lambda weight_map: weight_map.update({NORM: file}))  # type: ignore[dict-item]
    refused(sharded, "weight_map")


def test_index_lies(sharded: Path) -> None:
    good = (sharded / INDEX_FILE).read_text()
    edit_index(sharded, lambda weight_map: weight_map.pop(NORM))
    refused(sharded, "disagree", NORM)
    (sharded / INDEX_FILE).write_text(good)
    edit_index(
        sharded, lambda weight_map: weight_map.update(extra="model-00001-of-00002.safetensors")
    )
    refused(sharded, "disagree", "extra")
    (sharded / INDEX_FILE).write_text(good)
    edit_index(sharded, lambda weight_map: weight_map.update({NORM: "absent.safetensors"}))
    refused(sharded, "absent.safetensors", "missing")
    (sharded / INDEX_FILE).write_text("{}")
    refused(sharded, "weight_map")
    (sharded / INDEX_FILE).write_text(good)
    (sharded / "model-00003.safetensors").write_bytes(b"")
    refused(sharded, "model-00003.safetensors", "not named")


def test_shards_without_index_are_accepted_when_disjoint(sharded: Path) -> None:
    with_index = open_checkpoint(sharded).tensors
    (sharded / INDEX_FILE).unlink()
    assert open_checkpoint(sharded).tensors == with_index
    shard = sharded / "model-00001-of-00002.safetensors"
    (sharded / "model-copy.safetensors").write_bytes(shard.read_bytes())
    refused(sharded, "is in both")


def test_links(folder: Path, tmp_path: Path) -> None:
    weights = folder / "model.safetensors"
    outside = weights.rename(tmp_path / "outside.safetensors")
    weights.symlink_to(outside)
    refused(folder, "outside the model folder")
    weights.unlink()
    weights.symlink_to(tmp_path / "absent")
    refused(folder, "broken link")


def test_hub_cache_links_are_followed(folder: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--a--b"
    snapshot = repository / "snapshots" / "abc"
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in folder.iterdir():
        blob = path.rename(repository / "blobs" / path.name.encode().hex())
        (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    assert take_inventory(snapshot).config.num_hidden_layers == 1


def write_with(tmp_path: Path, change: Callable[[dict[str, Any]], object], **config: Any) -> Path:
    weights: dict[str, Any] = random_weights(CONFIG)
    change(weights)
    return write_checkpoint(tmp_path / "m", {**CONFIG, **config}, weights, tokenizer=False)


UP = "model.layers.0.mlp.up_proj.weight"


def test_names_and_shapes_are_strict(tmp_path: Path) -> None:
    refused(write_with(tmp_path, lambda w: w.pop(UP)), "missing tensor", UP)
    extra = write_with(tmp_path, lambda w: w.update(extra=np.zeros(3, np.float32)))
    refused(extra, "unexpected tensor extra")
    refused(write_with(tmp_path, lambda w: w.update({UP: w[UP].T})), UP, "[64, 128]", "[128, 64]")
    integers = write_with(tmp_path, lambda w: w.update({UP: w[UP].astype(np.int32)}))
    refused(integers, UP, "I32")
    many = write_with(tmp_path, lambda w: [w.update({f"x{i}": w[UP]}) for i in range(30)])
    refused(many, "unexpected 30 tensors", "and 20 more")


def test_rotary_buffers_are_dropped(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    folder = write_with(tmp_path, lambda w: w.update({name: np.ones(8, np.float32)}))
    assert take_inventory(folder).dropped == {name: "derived from the config"}


def test_tied_head(tmp_path: Path) -> None:
    embedding = random_weights(CONFIG)["model.embed_tokens.weight"]

    def head(value: np.ndarray) -> Callable[[dict[str, Any]], object]:
        return lambda w: w.update({"lm_head.weight": value})

    equal = write_with(tmp_path, head(embedding), tie_word_embeddings=True)
    assert "lm_head.weight" in take_inventory(equal).dropped
    without = write_with(tmp_path, lambda w: w.pop("lm_head.weight"), tie_word_embeddings=True)
    assert mx.array_equal(
        load_model(equal)(mx.array([[1, 80]])), load_model(without)(mx.array([[1, 80]]))
    )
    other = write_with(tmp_path, head(embedding + 1), tie_word_embeddings=True)
    refused(other, "lm_head.weight", "differs")
    short = write_with(tmp_path, head(embedding[:10]), tie_word_embeddings=True)
    refused(short, "another form")
    refused(write_with(tmp_path, lambda w: w.pop("lm_head.weight")), "missing", "lm_head.weight")


def test_xielu_parameters(tmp_path: Path) -> None:
    prefix = "model.layers.0.mlp.act_fn."
    ids = mx.array([[1, 80, 90]])
    expected = load_model(write_with(tmp_path, lambda w: None))(ids)

    def scalar_alphas(w: dict[str, Any]) -> None:
        for name in ("alpha_p", "alpha_n"):
            w[prefix + name] = w[prefix + name].reshape(())
        for name in ("beta", "eps"):
            w[prefix + name] = w[prefix + name].reshape(1)

    assert mx.array_equal(load_model(write_with(tmp_path, scalar_alphas))(ids), expected)

    def without_constants(w: dict[str, Any]) -> None:
        del w[prefix + "beta"], w[prefix + "eps"]

    assert mx.array_equal(load_model(write_with(tmp_path, without_constants))(ids), expected)
    wide = write_with(tmp_path, lambda w: w.update({prefix + "alpha_p": np.ones(2, np.float32)}))
    refused(wide, "alpha_p", "[2]")
    refused(write_with(tmp_path, lambda w: w.pop(prefix + "alpha_n")), "missing", "alpha_n")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite(value: float, tmp_path: Path) -> None:
    def spoil(w: dict[str, Any]) -> None:
        w[UP][3, 4] = w[UP][5, 6] = value

    with pytest.raises(RejectedError, match=f"{UP}: 2 values are not finite; the"):
        load_model(write_with(tmp_path, spoil))


def test_other_formats_are_named(tmp_path: Path) -> None:
    for method in ("compressed-tensors", "gptq", "awq", "bitsandbytes"):
        block = {"quant_method": method, "bits": 4, "group_size": 64}
        folder = write_with(tmp_path, lambda w: None, quantization_config=block)
        if method in ("gptq", "awq"):
            refused(folder, method, "apertus-mlx convert")
    block = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    refused(write_with(tmp_path, lambda w: None, quantization_config=block), "compressed-tensors")


def test_code_in_the_folder_is_never_run(folder: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    (folder / "evil.py").write_text(f"open({str(canary)!r}, 'w')")
    code = {"auto_map": {"AutoModelForCausalLM": "evil.Model"}, "model_file": "evil.py"}
    write_json(folder / "config.json", {**CONFIG, **code})
    assert take_inventory(folder).config.asks_for_code == ("auto_map", "model_file")
    load_model(folder)
    assert not canary.exists()


def test_variants_are_left_alone(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "single", config_4x())
    whole = open_checkpoint(folder)
    shutil.copy(folder / "model.safetensors", folder / "model.fp16.safetensors")
    assert open_checkpoint(folder) == whole
    folder = write_checkpoint(tmp_path / "sharded", config_4x(), shards=2)
    whole = open_checkpoint(folder)
    for number in (1, 2):
        (folder / f"model.fp16-0000{number}-of-00002.safetensors").write_bytes(b"")
    assert open_checkpoint(folder) == whole


def test_a_variant_alone_is_the_model(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, config_4x())
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")
    assert open_checkpoint(folder).files == ("model.fp16.safetensors",)
    shutil.copy(folder / "model.fp16.safetensors", folder / "model.bf16.safetensors")
    with pytest.raises(RejectedError, match="which are the model's"):
        open_checkpoint(folder)


BITSANDBYTES = {
    "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
}  # fmt: skip


def test_a_block_about_loading_beside_plain_weights(tmp_path: Path) -> None:
    """A fine-tune that was loaded in 4 bits, then merged and saved in 16."""
    plain = config_4x()
    folder = write_checkpoint(tmp_path / "merged", {**plain, "quantization_config": BITSANDBYTES})
    ours = load_model(folder)(mx.array([[1, 2, 3]]))
    theirs = load_model(write_checkpoint(tmp_path / "plain", plain))(mx.array([[1, 2, 3]]))
    assert mx.array_equal(ours, theirs)
    weights = random_weights(plain)
    weights["lm_head.weight"] = np.zeros((384, 64), np.uint8)
    block = {**plain, "quantization_config": BITSANDBYTES}
    folder = write_checkpoint(tmp_path / "packed", block, weights)
    with pytest.raises(RejectedError, match=r"'bitsandbytes', which is not read; use the"):
        take_inventory(folder)
