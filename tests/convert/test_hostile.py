"""Damaged, hostile and contradictory inputs: an exit code, one line, and no new files.

The numbers are those of the project's list of bad inputs.
"""

from __future__ import annotations

import json
import os
import re
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from apertus_mlx import cli
from tests import convert_builders as build

Change = Callable[[Path], None]


class Result:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def error(self) -> str:
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.err
        assert "Traceback" not in self.err
        assert self.err.rstrip().splitlines()[-1] == lines[0]
        return lines[0]


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., Result]:
    """Runs the command line in this process, in an empty folder."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)

    def call(*arguments: str | Path) -> Result:
        monkeypatch.setattr(sys, "argv", ["apertus-mlx", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as error:
            code = int(error.code or 0)
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return call


def config_change(**changes: Any) -> Change:
    def change(source: Path) -> None:
        values = json.loads((source / "config.json").read_text())
        values.update(changes)
        values = {key: value for key, value in values.items() if value is not build.REMOVED}
        build.write_json(source / "config.json", values)

    return change


def config_bytes(content: bytes) -> Change:
    return lambda source: (source / "config.json").write_bytes(content) and None


def tensor_change(name: str, tensor: build.Raw | None) -> Change:
    def change(source: Path) -> None:
        tensors = build.read_folder(source)
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
        build.write_safetensors(source / "model.safetensors", tensors)

    return change


def weights_bytes(edit: Callable[[bytes], bytes]) -> Change:
    def change(source: Path) -> None:
        path = source / "model.safetensors"
        path.write_bytes(edit(path.read_bytes()))

    return change


def header_change(edit: Callable[[dict[str, Any]], object]) -> Change:
    def change(content: bytes) -> bytes:
        length = struct.unpack("<Q", content[:8])[0]
        header = json.loads(content[8 : 8 + length])
        text = edit(header)
        raw = text if isinstance(text, bytes) else json.dumps(header).encode()
        return struct.pack("<Q", len(raw)) + raw + content[8 + length :]

    return weights_bytes(change)


def entry(name: str, **changes: Any) -> Change:
    return header_change(lambda header: header[name].update(changes))


def remove(*names: str) -> Change:
    def change(source: Path) -> None:
        for name in names:
            (source / name).unlink()

    return change


def rename_weights(name: str) -> Change:
    return lambda source: (source / "model.safetensors").rename(source / name) and None


def index_change(edit: Callable[[dict[str, str]], object]) -> Change:
    def change(source: Path) -> None:
        tensors = build.read_folder(source)
        (source / "model.safetensors").unlink()
        values = json.loads((source / "config.json").read_text())
        build.write_checkpoint(source, values, tensors, shards=2)
        path = source / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        edit(index["weight_map"])
        build.write_json(path, index)

    return change


def link_out(source: Path) -> None:
    elsewhere = source.parent / "elsewhere.safetensors"
    (source / "model.safetensors").rename(elsewhere)
    (source / "model.safetensors").symlink_to(elsewhere)


UP = "model.layers.0.mlp.up_proj.weight"
NORM = "model.norm.weight"
ALPHA = "model.layers.0.mlp.act_fn.alpha_p"


def with_value(shape: tuple[int, ...], value: float) -> build.Raw:
    array = np.full(shape, 0.01, np.float32)
    array.flat[3] = value
    return build.raw(array, "BF16")


def shard_twice(source: Path) -> None:
    tensors = build.read_folder(source)
    (source / "model.safetensors").unlink()
    build.write_safetensors(source / "model-a.safetensors", tensors)
    build.write_safetensors(source / "model-b.safetensors", {NORM: tensors[NORM]})


def missing_shard(source: Path) -> None:
    index_change(lambda _: None)(source)
    (source / "model-00002-of-00002.safetensors").unlink()


def extra_shard(source: Path) -> None:
    index_change(lambda _: None)(source)
    build.write_safetensors(source / "model-x.safetensors", {"a": build.raw(np.zeros(1), "F32")})


def tokenizer_ids(source: Path) -> None:
    build.write_tokenizer(source, special_tokens=200)


REJECTED: dict[str, tuple[Change, str]] = {
    "1 empty folder": (
        remove("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
               "generation_config.json", "chat_template.jinja"),
        r"no config.json and no \*.safetensors",
    ),
    "2 no config": (remove("config.json"), "no config.json"),
    "2 empty config": (config_bytes(b""), "empty"),
    "2 no JSON": (config_bytes(b"{'a': 1}"), "not valid JSON"),
    "2 not UTF-8": (config_bytes(b"\xff\xfe{}"), "not UTF-8"),
    "3 list": (config_bytes(b"[]"), "JSON object"),
    "3 string for a number": (config_change(hidden_size="128"), "hidden_size.*integer"),
    "3 fraction": (config_change(num_hidden_layers=2.5), "num_hidden_layers.*integer"),
    "3 boolean": (config_change(vocab_size=True), "vocab_size.*integer"),
    "4 duplicate key": (config_bytes(b'{"model_type": "apertus", "model_type": "x"}'), "duplicate"),
    "5 model type": (config_change(model_type="llama"), "llama.*not supported"),
    "6 activation": (config_change(hidden_act="silu"), "hidden_act"),
    "6 qk_norm": (config_change(qk_norm=False), "qk_norm"),
    "6 post_norm": (config_change(post_norm=True), "post_norm"),
    "6 bias": (config_change(attention_bias=True), "attention_bias"),
    "7 no heads": (config_change(num_attention_heads=0), "num_attention_heads"),
    "7 negative heads": (config_change(num_attention_heads=-4), "num_attention_heads"),
    "7 heads": (config_change(num_attention_heads=3, num_key_value_heads=3), "does not divide"),
    "7 kv heads": (config_change(num_key_value_heads=3), "num_key_value_heads"),
    "8 head_dim": (config_change(head_dim=64), "shape"),
    "9 layers": (config_change(num_hidden_layers=10**6), "num_hidden_layers"),
    "9 vocabulary": (config_change(vocab_size=2**31), "vocab_size"),
    "9 width": (config_change(hidden_size=10**9), "hidden_size"),
    "10 no theta": (config_change(rope_theta=build.REMOVED), "rope_theta"),
    "10 disagreement": (
        config_change(rope_parameters={"rope_type": "default", "rope_theta": 10.0}), "disagree",
    ),
    "10 unknown rope": (config_change(rope_scaling={"rope_type": "yarn", "factor": 2}), "yarn"),
    "10 factor": (config_change(rope_scaling={"rope_type": "linear", "factor": 0}), "factor"),
    "10 NaN": (config_bytes(b'{"model_type": "apertus", "rope_theta": NaN}'), "NaN"),
    "10 float object": (config_change(rope_theta={"__float__": "Infinity"}), "rope_theta"),
    "12 no head": (tensor_change("lm_head.weight", None), "lm_head.weight"),
    "14 pickle": (rename_weights("pytorch_model.bin"), "safetensors"),
    "14 gguf": (rename_weights("model.gguf"), "safetensors"),
    "14 npz": (rename_weights("weights.npz"), "safetensors"),
    "15 LFS pointer": (
        weights_bytes(lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "LFS pointer",
    ),
    "16 truncated": (weights_bytes(lambda content: content[:-100]), "truncated"),
    "16 empty": (weights_bytes(lambda _: b""), "too short"),
    "16 seven bytes": (weights_bytes(lambda _: b"1234567"), "too short"),
    "17 header 0": (weights_bytes(lambda c: bytes(8) + c[8:]), "header"),
    "17 header too long": (weights_bytes(lambda c: struct.pack("<Q", len(c)) + c[8:]), "header"),
    "17 header 200 MB": (weights_bytes(lambda c: struct.pack("<Q", 2 * 10**8) + c[8:]), "header"),
    "17 header 2^63": (weights_bytes(lambda c: struct.pack("<Q", 2**63) + c[8:]), "header"),
    "18 not UTF-8": (header_change(lambda _: b'{"\xff": 1}'), "UTF-8"),
    "18 not an object": (header_change(lambda _: b"[1, 2]"), "object"),
    "18 deep": (header_change(lambda _: b'{"a":' + b"[" * 200_000), "header"),
    "19 negative": (entry(NORM, shape=[-128]), "shape"),
    "19 fraction": (entry(NORM, shape=[128.0]), "shape"),
    "19 huge": (entry(NORM, shape=[2**32, 2**32]), "shape"),
    "19 overflow": (entry(NORM, shape=[2**30, 2**30, 2**30]), "bytes"),
    "20 overlap": (entry(NORM, data_offsets=[0, 256]), "overlap|hole"),
    "20 past the end": (entry(NORM, data_offsets=[10**9, 10**9 + 256]), "hole|truncated"),
    "20 wrapping": (entry(NORM, data_offsets=[2**64 - 8, 248]), "offsets"),
    "20 trailing bytes": (weights_bytes(lambda content: content + b"x"), "other bytes"),
    "21 duplicate tensor": (
        header_change(
            lambda h: json.dumps(h).replace('"lm_head.weight"', f'"{NORM}"').encode()
        ),
        "duplicate",
    ),
    "21 two shards": (shard_twice, "both"),
    "22 unknown type": (entry(NORM, dtype="F4"), "F4"),
    "22 FP8": (
        tensor_change(UP, build.Raw("F8_E4M3", (256, 128), bytes(256 * 128))), "F8_E4M3",
    ),
    "22 unknown method": (config_change(quantization_config={"quant_method": "hqq"}), "hqq"),
    "23 integers": (tensor_change(UP, build.raw(np.zeros((256, 128), np.int32))), "I32"),
    "24 missing": (tensor_change(UP, None), "missing"),
    "24 unexpected": (tensor_change("model.extra", build.raw(np.zeros(3), "F32")), "unexpected"),
    "25 transposed": (
        tensor_change(UP, build.raw(np.zeros((128, 256)), "BF16")), r"\[128, 256\].*\[256, 128\]",
    ),
    "26 two alphas": (tensor_change(ALPHA, build.raw(np.zeros(2), "BF16")), "alpha_p"),
    "26 no alpha": (tensor_change(ALPHA, None), "alpha_p"),
    "27 NaN": (tensor_change(UP, with_value((256, 128), np.nan)), "up_proj.*1 value is NaN"),
    "27 infinity": (tensor_change(NORM, with_value((128,), np.inf)), "norm.*NaN or infinite"),
    "29 missing shard": (missing_shard, "missing"),
    "29 extra shard": (extra_shard, "not named"),
    "29 index lies": (index_change(lambda m: m.update({NORM: m["lm_head.weight"]})), "disagree"),
    "30 parent": (index_change(lambda m: m.update({NORM: "../a.safetensors"})), "plain"),
    "30 absolute": (index_change(lambda m: m.update({NORM: "/etc/a.safetensors"})), "plain"),
    "30 drive": (index_change(lambda m: m.update({NORM: "C:\\a.safetensors"})), "plain"),
    "30 UNC": (index_change(lambda m: m.update({NORM: "\\\\a\\b.safetensors"})), "plain"),
    "30 NUL": (index_change(lambda m: m.update({NORM: "a\0.safetensors"})), "plain"),
    "30 link": (link_out, "outside"),
    "45 no tokenizer": (remove("tokenizer.json"), "tokenizer.json"),
    "45 ids beyond the vocabulary": (tokenizer_ids, "token id 455.*384"),
    "45 damaged tokenizer": (
        lambda source: (source / "tokenizer.json").write_bytes(b"{}") and None, "tokenizer",
    ),
    "45 eos out of range": (config_change(eos_token_id=384), "eos_token_id"),
    "45 eos string": (config_change(eos_token_id="2"), "eos_token_id"),
    "45 generation eos": (
        lambda source: build.write_json(source / "generation_config.json", {"eos_token_id": [999]}),
        "eos_token_id",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REJECTED)
def test_a_bad_source_is_rejected(case: str, run: Callable[..., Result], tmp_path: Path) -> None:
    change, message = REJECTED[case]
    source = build.write_checkpoint(tmp_path / "in")
    change(source)
    before = build.tree(tmp_path)
    result = run("convert", source, tmp_path / "out", "--bits", "4")
    assert result.code == 3, result.err
    assert re.search(message, result.error), result.error
    assert result.out == ""
    assert build.tree(tmp_path) == before
    assert not (tmp_path / "out").exists()


def test_11_a_tied_head_that_differs(run: Callable[..., Result], tmp_path: Path) -> None:
    values = build.config(tie_word_embeddings=True)
    tensors = build.random_tensors(values)
    tensors["lm_head.weight"] = build.raw(np.full((384, 128), 0.25), "BF16")
    source = build.write_checkpoint(tmp_path / "in", values, tensors)
    result = run("convert", source, tmp_path / "out", "--bits", "4")
    assert result.code == 3
    assert "--allow-untied-head" in result.error
    assert run("convert", source, tmp_path / "out", "--bits", "4", "--allow-untied-head").code == 0


def test_2_a_byte_order_mark_is_accepted(run: Callable[..., Result], tmp_path: Path) -> None:
    source = build.write_checkpoint(tmp_path / "in")
    content = (source / "config.json").read_bytes()
    (source / "config.json").write_bytes(b"\xef\xbb\xbf" + content)
    assert run("convert", source, tmp_path / "out", "--bits", "4").code == 0


def test_8_a_head_dim_of_its_own_is_honoured(run: Callable[..., Result], tmp_path: Path) -> None:
    values = build.config(head_dim=64)
    source = build.write_checkpoint(tmp_path / "in", values)
    result = run("convert", source, tmp_path / "out", "--bits", "4")
    assert result.code == 0
    assert "mlx-swift-lm cannot run this" in result.err
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["head_dim"] == 64


def test_13_code_is_neither_run_nor_copied(run: Callable[..., Result], tmp_path: Path) -> None:
    values = build.config(auto_map={"AutoModel": "evil.Model"}, model_file="evil.py")
    source = build.write_checkpoint(tmp_path / "in", values)
    canary = tmp_path / "canary"
    (source / "evil.py").write_text(f"open({str(canary)!r}, 'w')")
    result = run("convert", source, tmp_path / "out", "--bits", "4")
    assert result.code == 0
    assert "auto_map, model_file" in result.err
    assert not canary.exists()
    assert not (tmp_path / "out" / "evil.py").exists()
    assert "auto_map" not in (tmp_path / "out" / "config.json").read_text()


def test_27_nonfinite_values_pass_only_where_nothing_is_quantized(
    run: Callable[..., Result], tmp_path: Path
) -> None:
    source = build.write_checkpoint(tmp_path / "in")
    tensor_change(UP, with_value((256, 128), np.nan))(source)
    assert run("convert", source, tmp_path / "a", "--allow-nonfinite").code == 0
    result = run("convert", source, tmp_path / "b", "--allow-nonfinite", "--bits", "4")
    assert result.code == 2
    assert "--allow-nonfinite" in result.error


def test_28_values_beyond_float16(run: Callable[..., Result], tmp_path: Path) -> None:
    source = build.write_checkpoint(tmp_path / "in")
    tensor_change(UP, with_value((256, 128), 1e6))(source)
    result = run("convert", source, tmp_path / "out", "--bits", "4", "--dtype", "float16")
    assert result.code == 3
    assert "up_proj" in result.error
    assert "--dtype bfloat16" in result.error
    assert not (tmp_path / "out").exists()


def test_29_shards_without_an_index_are_accepted(
    run: Callable[..., Result], tmp_path: Path
) -> None:
    source = build.write_checkpoint(tmp_path / "in", shards=3)
    (source / "model.safetensors.index.json").unlink()
    assert run("convert", source, tmp_path / "out", "--bits", "4").code == 0


def test_31_a_hub_cache_of_links_is_accepted(run: Callable[..., Result], tmp_path: Path) -> None:
    source = build.write_checkpoint(tmp_path / "models--a--b" / "snapshots" / "abc")
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir()
    for path in list(source.iterdir()):
        path.rename(blobs / path.name)
        path.symlink_to(blobs / path.name)
    assert run("convert", source, tmp_path / "out", "--bits", "4").code == 0
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


@pytest.mark.parametrize("name", ["modelλ.safetensors", "model" + "x" * 238 + ".safetensors"])
def test_32_unusual_file_names_are_read(
    run: Callable[..., Result], tmp_path: Path, name: str
) -> None:
    source = build.write_checkpoint(tmp_path / "in")
    (source / "model.safetensors").rename(source / name)
    assert run("convert", source, tmp_path / "out", "--bits", "4").code == 0


def test_33_a_quantized_source_with_bits(run: Callable[..., Result], tmp_path: Path) -> None:
    source = build.write_checkpoint(tmp_path / "in")
    assert run("convert", source, tmp_path / "q4", "--bits", "4").code == 0
    result = run("convert", tmp_path / "q4", tmp_path / "q3", "--bits", "3")
    assert result.code == 3
    assert "--requantize" in result.error
    result = run("convert", tmp_path / "q4", tmp_path / "q3", "--bits", "3", "--requantize")
    assert result.code == 0
    assert "given up" in result.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bits", "0"], "2, 3, 4, 5, 6 or 8"),
        (["--bits", "1"], "2, 3, 4, 5, 6 or 8"),
        (["--bits", "7"], "2, 3, 4, 5, 6 or 8"),
        (["--bits", "8.5"], "--bits"),
        (["--bits", "four"], "--bits"),
        (["--bits", "-4"], "2, 3, 4, 5, 6 or 8"),
        (["--bits", "4", "--group-size", "16"], "32, 64 or 128"),
        (["--bits", "4", "--group-size", "48"], "32, 64 or 128"),
        (["--bits", "4", "--group-size", "0"], "32, 64 or 128"),
        (["--bits", "4", "--group-size", "256"], "32, 64 or 128"),
        (["--group-size", "64"], "--bits"),
        (["--bits", "4", "--mode", "nf4"], "nf4"),
        (["--bits", "3", "--mode", "mxfp4"], "mxfp4 has 4 bits"),
        (["--bits", "4", "--set", "*.nothing=6"], "matches no module"),
        (["--bits", "4", "--set", "*.up_proj=6", "--set", "*mlp*=3"], "different formats"),
        (["--bits", "4", "--set", "up_proj"], "PATTERN=BITS"),
        (["--bits", "4", "--set", "*.up_proj=x"], "expected"),
        (["--bits", "4", "--dtype", "int8"], "dtype"),
        (["--bits", "4", "--dequantize"], "not quantized"),
        (["--requantize"], "--bits"),
        (["--bits", "4", "--frobnicate"], "frobnicate"),
        (["--recipe", "missing.toml"], "missing.toml"),
        (["--bits", "4", "--revision", "main"], "--revision"),
    ],
)
def test_35_to_38_bad_requests(
    options: list[str], message: str, run: Callable[..., Result], tmp_path: Path
) -> None:
    source = build.write_checkpoint(tmp_path / "in")
    before = build.tree(tmp_path)
    result = run("convert", source, tmp_path / "out", *options)
    assert result.code == 2, result.err
    assert message in result.error
    assert build.tree(tmp_path) == before


def test_head_bits_of_a_tied_model(run: Callable[..., Result], tmp_path: Path) -> None:
    source = build.write_checkpoint(tmp_path / "in", build.config(tie_word_embeddings=True))
    result = run("convert", source, tmp_path / "out", "--bits", "4", "--head-bits", "6")
    assert result.code == 2
    assert "--embed-bits" in result.error


def test_37_nothing_divides(run: Callable[..., Result], tmp_path: Path) -> None:
    values = build.config(hidden_size=48, intermediate_size=80, num_attention_heads=3,
                          num_key_value_heads=3)  # fmt: skip
    source = build.write_checkpoint(tmp_path / "in", values)
    result = run("convert", source, tmp_path / "out", "--bits", "4")
    assert result.code == 3
    assert "nothing would be quantized" in result.error


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("bits = 4\nbitz = 3", "bitz"),
        ("bits = '4'", "bits"),
        ("bits = 7", "7 bits"),
        ("bits = [", "TOML"),
        ("modules = 3", "modules"),
        ("bits = 4\n[modules]\n'*.up_proj' = 6", "up_proj"),
        ("bits = 4\n[modules]\n'*.nothing' = false", "nothing"),
    ],
)
def test_bad_recipes(
    content: str, message: str, run: Callable[..., Result], tmp_path: Path
) -> None:
    source = build.write_checkpoint(tmp_path / "in")
    (tmp_path / "recipe.toml").write_text(content)
    result = run("convert", source, tmp_path / "out", "--recipe", tmp_path / "recipe.toml")
    assert result.code == 2, result.err
    assert message in result.error


def test_39_output_places(run: Callable[..., Result], tmp_path: Path) -> None:
    source = build.write_checkpoint(tmp_path / "in")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    (tmp_path / "file").write_text("x")
    (tmp_path / "locked").mkdir()
    before = build.tree(tmp_path)
    for target, message in [
        (tmp_path / "full", "not empty"),
        (tmp_path / "file", "not a folder"),
        (source, "not empty"),
        (source / "out", "in or around"),
        (tmp_path / "missing" / "out", "no such folder"),
        (Path("/"), "output"),
    ]:
        result = run("convert", source, target, "--bits", "4")
        assert result.code == 2, target
        assert message in result.error
    if os.geteuid() != 0:
        (tmp_path / "locked").chmod(0o500)
        assert run("convert", source, tmp_path / "locked" / "out", "--bits", "4").code == 2
    assert build.tree(tmp_path) == before
    (tmp_path / "empty").mkdir()
    assert run("convert", source, tmp_path / "empty", "--bits", "4").code == 0


def test_39_a_hub_id_never_leaves_the_folder(run: Callable[..., Result], tmp_path: Path) -> None:
    result = run("convert", "../../etc", "--bits", "4", "--offline")
    assert result.code == 4
    assert result.error
    assert list((tmp_path / "work").iterdir()) == []


def test_the_default_output_is_named_after_the_source(
    run: Callable[..., Result], tmp_path: Path
) -> None:
    source = build.write_checkpoint(tmp_path / "Apertus-x")
    result = run("convert", source, "--bits", "3")
    assert result.code == 0
    assert result.out == "Apertus-x-MLX-3bit\n"
    assert (tmp_path / "work" / "Apertus-x-MLX-3bit" / "config.json").is_file()


def test_the_plan_is_data_and_writes_nothing(run: Callable[..., Result], tmp_path: Path) -> None:
    source = build.write_checkpoint(tmp_path / "in")
    result = run("convert", source, "--bits", "4", "--plan")
    assert result.code == 0
    assert "bits per weight" in result.out
    assert "model.layers.*.mlp.up_proj" in result.out
    result = run("convert", source, "--bits", "4", "--head-bits", "6", "--plan", "--json")
    plan = json.loads(result.out)
    modules = {module["module"]: module for module in plan["modules"]}
    assert modules["lm_head"]["bits"] == 6
    assert modules["model.embed_tokens"]["bits"] == 4
    assert plan["output_bytes"] == sum(
        output["size_bytes"] for module in plan["modules"] for output in module["outputs"]
    )
    assert list((tmp_path / "work").iterdir()) == []


def test_json_is_one_object_on_stdout(run: Callable[..., Result], tmp_path: Path) -> None:
    source = build.write_checkpoint(tmp_path / "in")
    result = run("convert", source, tmp_path / "out", "--bits", "4", "--json")
    assert json.loads(result.out)["output"] == str(tmp_path / "out")
