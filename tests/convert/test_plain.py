"""Conversion of Hugging Face checkpoints, compared with `mx.quantize` and with mlx-lm."""

from __future__ import annotations

import hashlib
import json
import sys
from contextlib import suppress
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from apertus_mlx import cli
from apertus_mlx.checkpoint.config import read_config
from apertus_mlx.checkpoint.inventory import take_inventory
from apertus_mlx.convert.job import convert, prepare
from apertus_mlx.convert.plan.policy import Request, Rule
from apertus_mlx.convert.sources import reading
from apertus_mlx.errors import RejectedError
from apertus_mlx.quant.spec import FLOAT_MODES, QuantSpec
from tests import convert_builders as build
from tests.daily import every
from tests.hub_server import point_client_at, serving

AFFINE = [(bits, group) for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)]


def run(source: Path, target: Path, request: Request, **options: int) -> dict[str, build.Raw]:
    convert(prepare(source, request, source.name, **options), target)
    return build.read_folder(target)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few rows, so that every matrix takes several."""
    monkeypatch.setattr(reading, "BLOCK_BYTES", 5000)


@pytest.mark.parametrize(
    "spec",
    every(
        4,
        [QuantSpec(bits, group) for bits, group in AFFINE]
        + [QuantSpec(bits, group, mode) for mode, (bits, group) in FLOAT_MODES.items()],
    ),
    ids=str,
)
@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_codes_equal_those_of_mlx_for_each_whole_tensor(
    tmp_path: Path, spec: QuantSpec, dtype: str
) -> None:
    values = build.config(tie_word_embeddings=True, num_hidden_layers=1)
    tensors = build.random_tensors(values, dtype)
    source = build.write_checkpoint(tmp_path / "in", values, tensors)
    found = run(source, tmp_path / "out", Request(spec))
    for name, tensor in tensors.items():
        if len(tensor.shape) < 2:
            assert found.pop(name) == tensor
            continue
        expected = mx.quantize(
            build.as_mlx(tensor), group_size=spec.group_size, bits=spec.bits, mode=spec.mode
        )
        for part, array in zip(("weight", "scales", "biases"), expected, strict=False):
            stored = build.as_mlx(found.pop(name.replace("weight", part)))
            assert stored.dtype == array.dtype
            assert mx.array_equal(stored, array)
    assert not found
    take_inventory(tmp_path / "out")


@pytest.mark.parametrize("tied", every(2, [True, False]))
@pytest.mark.parametrize(
    "spec",
    every(
        2,
        [QuantSpec(bits, 64) for bits in (2, 3, 4, 5, 6, 8)]
        + [QuantSpec(bits, group, mode) for mode, (bits, group) in FLOAT_MODES.items()],
    ),
    ids=str,
)
def test_mlx_lm_converts_to_the_same_weights_and_computes_the_same_from_ours(
    tmp_path: Path, tied: bool, spec: QuantSpec
) -> None:
    mlx_lm = pytest.importorskip("mlx_lm")
    from mlx_lm.utils import load_model

    values = build.config(tie_word_embeddings=tied)
    source = build.write_checkpoint(tmp_path / "in", values)
    ours = run(source, tmp_path / "ours", Request(spec))
    mlx_lm.convert(
        str(source), str(tmp_path / "theirs"), quantize=True, q_group_size=spec.group_size,
        q_bits=spec.bits, q_mode=spec.mode,
    )  # fmt: skip
    theirs = build.read_folder(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name].dtype, ours[name].data) == (tensor.dtype, tensor.data), name
    logits = []
    for folder in ("ours", "theirs"):
        model, _ = load_model(tmp_path / folder)
        model.set_dtype(mx.float32)
        logits.append(model(mx.array([[1, 70, 200, 320]])))
    assert mx.array_equal(*logits)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("shards", [1, 3])
def test_without_bits_every_value_stays(tmp_path: Path, dtype: str, shards: int) -> None:
    values = build.config(torch_dtype=build.REMOVED)
    tensors = build.random_tensors(values, dtype)
    source = build.write_checkpoint(tmp_path / "in", values, tensors, shards)
    assert run(source, tmp_path / "out", Request()) == tensors


def test_float32_weights_are_rounded_once_and_then_quantized(tmp_path: Path) -> None:
    values = build.config(torch_dtype="float32")
    tensors = build.random_tensors(values, "F32")
    source = build.write_checkpoint(tmp_path / "in", values, tensors)
    job = prepare(source, Request(QuantSpec(4, 64)), "x")
    assert any("F32 rounded to BF16" in note for note in job.plan.notes)
    convert(job, tmp_path / "out")
    found = build.read_folder(tmp_path / "out")
    name = "model.layers.0.mlp.up_proj.weight"
    rounded = build.as_mlx(tensors[name]).astype(mx.bfloat16)
    assert mx.array_equal(build.as_mlx(found[name]), mx.quantize(rounded, 64, 4)[0])
    assert {tensor.dtype for tensor in found.values()} == {"U32", "BF16"}


def test_what_the_plan_says_of_rounding_holds(tmp_path: Path) -> None:
    """Also of a row so small that float16 has nothing for it."""
    values = build.config()
    tensors = build.random_tensors(values, "BF16")
    name = "model.layers.0.mlp.up_proj.weight"
    weight = build.floats(tensors[name])
    weight[0], weight[1] = 2e-8, np.linspace(1e-8, 1e-4, weight.shape[1])
    tensors[name] = build.raw(weight, "BF16")
    source = build.write_checkpoint(tmp_path / "in", values, tensors)
    job = prepare(source, Request(dtype="F16"), "x")
    [note] = [each for each in job.plan.notes if "BF16 rounded to F16" in each]
    assert "error up to 0.05 %; below 6.1e-5 absolute, up to 3e-8" in note
    found = run(source, tmp_path / "out", Request(dtype="F16"))
    before, after = build.floats(tensors[name]), build.floats(found[name])
    error, small = np.abs(after - before), np.abs(before) < 6.1e-5
    assert not after[0].any() and small.any() and not small.all()
    assert (error[~small] <= 0.0005 * np.abs(before[~small])).all()
    assert (error[small] <= 3e-8).all() and error.max() > 1e-8


def test_one_thing_is_named_in_the_singular(tmp_path: Path) -> None:
    values = build.config()
    tensors = build.random_tensors(values)
    del tensors["model.layers.0.mlp.act_fn.beta"]
    source = build.write_checkpoint(tmp_path / "in", values, tensors)
    notes = prepare(source, Request(), "x").plan.notes
    assert "1 xIELU constant is absent: beta 0.5 and eps -1e-6 are written" in notes


def test_shards_and_index_describe_each_other(tmp_path: Path) -> None:
    source = build.write_checkpoint(tmp_path / "in")
    found = run(source, tmp_path / "out", Request(QuantSpec(4, 64)), max_shard_bytes=40_000)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == found.keys()
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(len(t.data) for t in found.values())
    assert run(source, tmp_path / "whole", Request(QuantSpec(4, 64))) == found


def test_tensors_lie_on_multiples_of_their_elements(tmp_path: Path) -> None:
    from safetensors import safe_open

    source = build.write_checkpoint(tmp_path / "in")
    run(source, tmp_path / "out", Request(QuantSpec(4, 64)))
    path = tmp_path / "out" / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert (8 + length) % 8 == 0
    for name, entry in json.loads(content[8 : 8 + length]).items():
        if name != "__metadata__":
            assert entry["data_offsets"][0] % build.SIZES[entry["dtype"]] == 0
    with safe_open(path, framework="np") as file:
        assert file.metadata() == {"format": "mlx"}


def test_per_module_formats(tmp_path: Path) -> None:
    source = build.write_checkpoint(tmp_path / "in")
    rules = (
        Rule("model.embed_tokens", QuantSpec(6, 64), "test"),
        Rule("lm_head", QuantSpec(8, 32), "test"),
        Rule("*.layers.0.mlp.*", QuantSpec(4, 32, "mxfp4"), "test"),
        Rule("*.v_proj", None, "test"),
    )
    run(source, tmp_path / "out", Request(QuantSpec(4, 64), rules))
    specs = take_inventory(tmp_path / "out").specs
    assert specs["model.embed_tokens"] == QuantSpec(6, 64)
    assert specs["lm_head"] == QuantSpec(8, 32)
    assert specs["model.layers.0.mlp.up_proj"] == QuantSpec(4, 32, "mxfp4")
    assert specs["model.layers.1.mlp.up_proj"] == QuantSpec(4, 64)
    assert "model.layers.0.self_attn.v_proj" not in specs
    pytest.importorskip("mlx_lm")
    from mlx_lm.utils import load_model

    model, _ = load_model(tmp_path / "out")
    assert model.model.layers[0].mlp.up_proj.mode == "mxfp4"


def test_a_row_that_does_not_divide_stays_plain_and_the_plan_says_why(tmp_path: Path) -> None:
    values = build.config(hidden_size=96, num_attention_heads=3, num_key_value_heads=3)
    source = build.write_checkpoint(tmp_path / "in", values)
    job = prepare(source, Request(QuantSpec(4, 64)), "x")
    reasons = {step.path: step.reason for step in job.plan.steps if step.reason}
    assert "96 columns" in str(reasons["model.layers.0.mlp.up_proj"])
    assert "model.layers.0.mlp.down_proj" in job.plan.specs
    convert(job, tmp_path / "out")
    assert take_inventory(tmp_path / "out").specs.keys() == job.plan.specs.keys()


@pytest.mark.parametrize("scaling", ["default", "linear", "llama3"])
@pytest.mark.parametrize("style", [4, 5])
def test_the_config_means_the_same_and_is_flat(tmp_path: Path, scaling: str, style: int) -> None:
    factors = {
        "default": {},
        "linear": {"factor": 2},
        "llama3": {"factor": 8, "low_freq_factor": 1, "high_freq_factor": 4,
                   "original_max_position_embeddings": 8192},
    }[scaling]  # fmt: skip
    block = {"rope_type": scaling, **factors}
    if style == 4:
        values = build.config(rope_scaling=None if scaling == "default" else block)
    else:
        removed = ("rope_scaling", "rope_theta", "mlp_bias", "qk_norm", "post_norm", "torch_dtype")
        values = build.config(
            **dict.fromkeys(removed, build.REMOVED),
            dtype="bfloat16",
            rope_parameters={"rope_theta": 500000.0, **block},
        )
    source = build.write_checkpoint(tmp_path / "in", values)
    run(source, tmp_path / "out", Request(QuantSpec(4, 64)))
    before, after = read_config(source), read_config(tmp_path / "out")
    assert after.rope == before.rope
    assert (after.hidden_size, after.tie_word_embeddings) == (128, False)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["rope_theta"] == 500000.0
    assert (written["rope_scaling"] is None) == (scaling == "default")
    for key in ("mlp_bias", "attention_bias", "qk_norm", "post_norm", "tie_word_embeddings"):
        assert isinstance(written[key], bool)
    assert "quantization_config" not in written
    if scaling != "default":
        assert written["rope_scaling"]["type"] == written["rope_scaling"]["rope_type"] == scaling
        assert isinstance(written["rope_scaling"]["factor"], float)


def test_xielu_constants_that_are_absent_are_written(tmp_path: Path) -> None:
    values = build.config()
    tensors = build.random_tensors(values)
    for name in [name for name in tensors if name.endswith((".beta", ".eps"))]:
        del tensors[name]
    source = build.write_checkpoint(tmp_path / "in", values, tensors)
    job = prepare(source, Request(), "x")
    assert any("xIELU constants are absent" in note for note in job.plan.notes)
    convert(job, tmp_path / "out")
    found = build.read_folder(tmp_path / "out")
    assert found["model.layers.0.mlp.act_fn.beta"] == build.raw(np.float32(0.5), "BF16")
    assert found["model.layers.1.mlp.act_fn.eps"] == build.raw(np.float32(-1e-6), "BF16")


def test_alphas_without_dimensions_become_vectors(tmp_path: Path) -> None:
    values = build.config()
    tensors = build.random_tensors(values)
    name = "model.layers.0.mlp.act_fn.alpha_p"
    tensors[name] = build.raw(np.float32(0.7), "BF16")
    source = build.write_checkpoint(tmp_path / "in", values, tensors)
    assert run(source, tmp_path / "out", Request())[name].shape == (1,)


def test_a_tied_head_that_is_stored_is_left_out(tmp_path: Path) -> None:
    values = build.config(tie_word_embeddings=True)
    tensors = build.random_tensors(values)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    source = build.write_checkpoint(tmp_path / "in", values, tensors)
    job = prepare(source, Request(), "x")
    assert "lm_head.weight left out: equal to the tied embedding" in job.plan.notes
    convert(job, tmp_path / "out")
    assert "lm_head.weight" not in build.read_folder(tmp_path / "out")


def test_a_tied_head_that_differs_can_be_kept(tmp_path: Path) -> None:
    values = build.config(tie_word_embeddings=True)
    tensors = build.random_tensors(values)
    tensors["lm_head.weight"] = build.raw(np.full((384, 128), 0.25), "BF16")
    source = build.write_checkpoint(tmp_path / "in", values, tensors)
    found = run(source, tmp_path / "out", Request(allow_untied_head=True))
    assert found["lm_head.weight"] == tensors["lm_head.weight"]
    assert read_config(tmp_path / "out").tie_word_embeddings is False


def test_the_text_part_of_apertus_1_5(tmp_path: Path) -> None:
    text = build.config(
        model_type="apertus1p5_text", vocab_size=448, output_vocab_size=384,
        rope_scaling=build.REMOVED, rope_theta=build.REMOVED,
        rope_parameters={"rope_type": "llama3", "rope_theta": 4e6, "factor": 32.0,
                         "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 8192},
    )  # fmt: skip
    tensors = build.random_tensors(text)
    outer = {
        "architectures": ["Apertus1p5ForConditionalGeneration"], "model_type": "apertus1p5",
        "text_config": text, "image_token_id": 400, "audio_token_id": 401,
    }  # fmt: skip
    nested = {
        name.replace("model.", "model.language_model.", 1): tensor
        for name, tensor in tensors.items()
    }
    nested["model.vision_tokenizer.codebook.weight"] = build.raw(np.zeros((4, 4)), "F32")
    nested["model.audio_tokenizer.codebook.weight"] = build.raw(np.zeros((4, 4)), "F32")
    source = build.write_checkpoint(tmp_path / "in", outer, nested)
    assert run(source, tmp_path / "plain", Request()) == tensors
    after = read_config(tmp_path / "plain")
    assert (after.family, after.vocab_size, after.output_vocab_size) == ("apertus", 448, 384)
    assert after.rope.factor == 32.0
    run(source, tmp_path / "out", Request(QuantSpec(4, 64)))
    assert take_inventory(tmp_path / "out").config.output_vocab_size == 384


def test_an_unknown_part_of_apertus_1_5_is_refused_by_name(tmp_path: Path) -> None:
    text = build.config(model_type="apertus1p5_text")
    tensors = build.random_tensors(text) | {
        "model.smell_tokenizer.x": build.raw(np.zeros(2), "F32")
    }
    outer = {"model_type": "apertus1p5", "text_config": text}
    source = build.write_checkpoint(tmp_path / "in", outer, tensors)
    with pytest.raises(RejectedError, match=r"unexpected tensor model.smell_tokenizer.x"):
        prepare(source, Request(), "x")
    build.write_json(source / "config.json", outer | {"smell_config": {}})
    with pytest.raises(RejectedError, match="smell_config"):
        prepare(source, Request(), "x")


def test_the_plan_of_a_hub_checkpoint_is_that_of_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only JSON and headers are asked for."""
    source = build.write_checkpoint(tmp_path / "in", shards=2)
    with serving() as server:
        point_client_at(server.endpoint, tmp_path / "home", monkeypatch)
        commit = server.repository("swiss-ai/Tiny").commit_folder(source)
        arguments = ["convert", "swiss-ai/Tiny", "--bits", "4", "--plan", "--json"]
        monkeypatch.setattr(sys, "argv", ["apertus-mlx", *arguments])
        with suppress(SystemExit):
            cli.main()
        remote = json.loads(capsys.readouterr().out)
        asked = [request for request in server.requests if request.path.endswith(".safetensors")]
    assert asked
    assert all(request.range for request in asked)
    local = prepare(source, Request(QuantSpec(4, 64)), "x").plan
    assert remote["commit"] == commit
    assert remote["output_bytes"] == local.weight_bytes
    assert [module["module"] for module in remote["modules"]] == [s.path for s in local.steps]
    assert not list(tmp_path.glob("home/**/*.safetensors"))


def test_companions_are_copied_byte_for_byte_and_code_is_not(tmp_path: Path) -> None:
    source = build.write_checkpoint(tmp_path / "in")
    (source / "evil.py").write_text("raise SystemExit")
    (source / "README.md").write_text("---\nlicense: apache-2.0\n---\nhello")
    (source / "LICENSE").write_bytes(b"terms\r\n")
    run(source, tmp_path / "out", Request(QuantSpec(4, 64)))
    out = tmp_path / "out"
    names = ("tokenizer.json", "tokenizer_config.json", "generation_config.json",
             "chat_template.jinja", "LICENSE")  # fmt: skip
    for name in names:
        assert (out / name).read_bytes() == (source / name).read_bytes()
    assert not (out / "evil.py").exists()
    assert "license: apache-2.0" in (out / "README.md").read_text()


def test_the_vocabulary_stands_there_as_a_table_too(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Library

    from apertus_mlx.hub.demo import model_dir
    from apertus_mlx.text.tokenizer import Tokenizer
    from apertus_mlx.text.vocabulary import TableVocabulary

    out = tmp_path / "out"
    convert(prepare(model_dir(), Request(QuantSpec(4, 64)), "embedded"), out)
    tokenizer = Tokenizer.load(out, vocab_size=1792, bos_token_id=1)
    assert isinstance(tokenizer._vocabulary, TableVocabulary)
    library = Library.from_file(str(out / "tokenizer.json"))
    text = "The capital of France is Paris. Grüezi, 3,50 €\n\t12"
    assert tokenizer.encode(text) == library.encode(text, add_special_tokens=False).ids


def test_the_manifest_holds_the_hash_of_every_file(tmp_path: Path) -> None:
    source = build.write_checkpoint(tmp_path / "in")
    run(source, tmp_path / "out", Request(QuantSpec(4, 64)))
    out = tmp_path / "out"
    manifest = json.loads((out / "apertus_mlx_manifest.json").read_text())
    files = {path.name for path in out.iterdir()} - {"apertus_mlx_manifest.json"}
    assert manifest["files"].keys() == files
    for name, record in manifest["files"].items():
        content = (out / name).read_bytes()
        assert record["size_bytes"] == len(content)
        assert record["sha256"] == hashlib.sha256(content).hexdigest()
    assert manifest["format_version"] == 1
    assert manifest["quality"] is None
    weights = sum(len(tensor.data) for tensor in build.read_folder(out).values())
    assert manifest["bits_per_weight"] == pytest.approx(
        8 * weights / manifest["parameters"], abs=1e-5
    )


def test_the_plan_states_exact_bytes(tmp_path: Path) -> None:
    source = build.write_checkpoint(tmp_path / "in")
    job = prepare(source, Request(QuantSpec(3, 32)), "x", max_shard_bytes=60_000)
    convert(job, tmp_path / "out")
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")}
    assert sizes == {file.name: file.size_bytes for file in job.plan.files}
