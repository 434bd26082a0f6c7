"""config.json: every style that is released is read, everything else is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from apertus_mlx.checkpoint import layout
from apertus_mlx.checkpoint.config import Rope, parse_config, read_config
from apertus_mlx.checkpoint.generation_config import read_generation_config
from apertus_mlx.errors import NotFoundError, RejectedError
from apertus_mlx.quant.spec import QuantSpec
from tests.builders import LLAMA3, config_4x, config_5x

# Geometry of the released models and their published parameter counts.
RELEASED = {
    438_349_312: {
        "hidden_size": 1024,
        "num_hidden_layers": 20,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "intermediate_size": 6144,
        "tie_word_embeddings": True,
    },
    1_510_019_072: {
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 12288,
    },
    8_053_338_112: {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 21504,
    },
    70_599_864_320: {
        "hidden_size": 8192,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "intermediate_size": 43008,
    },
}


@pytest.mark.parametrize("count", RELEASED)
def test_parameter_counts_of_released_models(count: int) -> None:
    config = parse_config(config_4x(vocab_size=131072, **RELEASED[count]))
    assert layout.parameter_count(config) == count


def test_tensor_count_of_the_released_8b() -> None:
    config = parse_config(config_4x(vocab_size=131072, **RELEASED[8_053_338_112]))
    assert len([*layout.matrices(config), *layout.vectors(config)]) == 451


@pytest.mark.parametrize("scaling", [None, LLAMA3, {"type": "linear", "factor": 2}])
def test_both_styles_mean_the_same(scaling: dict[str, Any] | None) -> None:
    old, new = config_4x(rope_scaling=scaling), config_5x(rope_scaling=scaling)
    assert parse_config(old) == parse_config(new)


def test_rope_readings() -> None:
    def rope(**changes: Any) -> Rope:
        return parse_config(config_4x(**changes)).rope

    assert rope() == Rope(500_000.0)
    assert rope(rope_scaling={"rope_type": "default"}) == Rope(500_000.0)
    assert rope(rope_scaling={"type": "linear", "factor": 2}) == Rope(500_000.0, "linear", 2.0)
    assert rope(rope_scaling=LLAMA3) == Rope(500_000.0, "llama3", 8.0, 1.0, 4.0, 64)
    both = {**LLAMA3, "rope_theta": 500_000.0}
    assert rope(rope_scaling=LLAMA3, rope_parameters=both) == rope(rope_scaling=LLAMA3)


def test_optional_keys() -> None:
    config = config_4x(eos_token_id=68)
    for key in ("num_key_value_heads", "tie_word_embeddings", "hidden_act", "pad_token_id"):
        del config[key]
    parsed = parse_config(config)
    assert parsed.num_key_value_heads == 4
    assert not parsed.tie_word_embeddings
    assert parsed.eos_token_ids == (68,)
    assert parse_config(config_4x(head_dim=32)).head_dim == 32


def test_mlx_quantization_block() -> None:
    block = {
        "group_size": 64,
        "bits": 4,
        "model.embed_tokens": {"group_size": 32, "bits": 6},
        "lm_head": False,
        "model.layers.0.mlp.up_proj": {"group_size": 32, "bits": 8, "mode": "mxfp8"},
    }
    config = parse_config(config_4x(quantization=block, quantization_config=block))
    assert config.quantization is not None
    assert config.quantization.spec_for("model.layers.1.mlp.up_proj") == QuantSpec(4, 64)
    assert config.quantization.spec_for("model.embed_tokens") == QuantSpec(6, 32)
    assert config.quantization.spec_for("lm_head") is None
    mxfp8 = config.quantization.spec_for("model.layers.0.mlp.up_proj")
    assert mxfp8 == QuantSpec(8, 32, "mxfp8")


def test_apertus_1_5_text_part() -> None:
    text = config_5x(rope_scaling=LLAMA3, model_type="apertus1p5_text", output_vocab_size=200)
    outer = {
        "architectures": ["Apertus1p5ForConditionalGeneration"],
        "model_type": "apertus1p5",
        "image_token_id": 131079,
        "audio_token_id": 131085,
        "tie_word_embeddings": False,
        "text_config": text,
    }
    config = parse_config(outer)
    assert (config.family, config.vocab_size, config.output_vocab_size) == ("apertus1p5", 384, 200)


# What is wrong -> what the one-line message has to name.
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "llama"}, "model_type"),
    ({"model_type": None}, "model_type"),
    ({"hidden_act": "silu"}, "hidden_act"),
    ({"qk_norm": False}, "qk_norm"),
    ({"post_norm": True}, "post_norm"),
    ({"attention_bias": True}, "attention_bias"),
    ({"mlp_bias": True}, "mlp_bias"),
    ({"sliding_window": 4096}, "sliding_window"),
    ({"hidden_size": "64"}, "hidden_size: expected an integer, found '64'"),
    ({"hidden_size": 64.5}, "hidden_size"),
    ({"num_hidden_layers": True}, "num_hidden_layers"),
    ({"num_hidden_layers": None}, "num_hidden_layers: required, but null"),
    ({"num_attention_heads": 0}, "num_attention_heads"),
    ({"num_attention_heads": -4}, "num_attention_heads"),
    ({"num_attention_heads": 5, "num_key_value_heads": 5}, "does not divide hidden_size"),
    ({"num_key_value_heads": 3}, "num_key_value_heads"),
    ({"head_dim": 15}, "head_dim"),
    ({"num_hidden_layers": 10**6}, "num_hidden_layers"),
    ({"vocab_size": 2**31}, "vocab_size"),
    ({"hidden_size": 10**9}, "hidden_size"),
    ({"rms_norm_eps": 0}, "rms_norm_eps"),
    ({"rms_norm_eps": {"__float__": "Infinity"}}, "rms_norm_eps"),
    ({"rope_theta": None}, "rope_theta"),
    ({"rope_theta": -1}, "rope_theta"),
    ({"rope_theta": {"__float__": "Infinity"}}, "rope_theta"),
    ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "yarn"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
    ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor"),
    ({"rope_scaling": {"type": "linear"}}, "factor: required"),
    ({"rope_scaling": {**LLAMA3, "type": "linear"}}, "disagree"),
    ({"rope_scaling": {**LLAMA3, "mscale": 1}}, "mscale"),
    ({"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, "high_freq_factor"),
    ({"rope_scaling": LLAMA3, "rope_parameters": {"rope_theta": 500000}}, "disagree"),
    ({"rope_parameters": {"rope_theta": 10000}}, "disagree"),
    ({"rope_scaling": [1]}, "rope_scaling"),
    ({"torch_dtype": "float16", "dtype": "bfloat16"}, "disagree"),
    ({"torch_dtype": "int8"}, "dtype"),
    ({"eos_token_id": 384}, "eos_token_id"),
    ({"eos_token_id": [2, "68"]}, "eos_token_id"),
    ({"bos_token_id": 4000}, "bos_token_id"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
    ({"tie_word_embeddings": True, "output_vocab_size": 100}, "output_vocab_size"),
    ({"attention_sinks": 4}, "unknown key 'attention_sinks'"),
    ({"quantization": {"group_size": 64, "bits": "4"}}, "bits"),
    ({"quantization": {"group_size": 48, "bits": 4}}, "group size 48"),
    ({"quantization": {"group_size": 64, "bits": 7}}, "7 bits"),
    ({"quantization": {"group_size": 64, "bits": 4, "mode": "int"}}, "mode"),
    ({"quantization": {"bits": 4}}, "group_size"),
    ({"quantization": {"group_size": 64, "bits": 4, "source": "x"}}, "source"),
    ({"quantization": {"group_size": 64, "bits": 4},
      "quantization_config": {"group_size": 32, "bits": 4}}, "disagree"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "named"), REFUSED)
def test_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(RejectedError) as caught:
        parse_config(config_4x(**changes))
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_theta_missing_in_both_styles() -> None:
    config = config_4x()
    del config["rope_theta"]
    for broken in (config, {**config, "rope_parameters": {"rope_type": "default"}}):
        with pytest.raises(RejectedError, match="rope_theta: missing"):
            parse_config(broken)


def test_code_is_named_never_followed() -> None:
    config = parse_config(config_4x(auto_map={"AutoModel": "evil.Model"}, model_file="evil.py"))
    assert config.asks_for_code == ("auto_map", "model_file")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (b"", "empty"),
        (b"{", "not valid JSON"),
        (b"[1, 2]", "expected a JSON object"),
        (b'{"hidden_size": 1, "hidden_size": 2}', "duplicate key 'hidden_size'"),
        (b'{"rms_norm_eps": NaN}', "NaN"),
        (b"\xff\xfe{}", "not UTF-8"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "LFS pointer"),
        (b'{"a":' * 200_000, "nested too deeply"),
    ],
)
def test_damaged_files(text: bytes, named: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(RejectedError, match=named):
        read_config(tmp_path)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(RejectedError, match=r"no config.json and no \*.safetensors"):
        read_config(tmp_path)
    with pytest.raises(NotFoundError):
        read_config(tmp_path / "absent")


def test_byte_order_mark_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(config_4x()).encode())
    assert read_config(tmp_path) == parse_config(config_4x())


def test_generation_config(tmp_path: Path) -> None:
    def write(**values: Any) -> None:
        (tmp_path / "generation_config.json").write_text(json.dumps(values))

    assert read_generation_config(tmp_path, 100).eos_token_ids == ()
    write(eos_token_id=[2, 68, 72], temperature=0.8, top_p=0.9, do_sample=True, num_beams=4)
    config = read_generation_config(tmp_path, 100)
    assert config.eos_token_ids == (2, 68, 72)
    assert (config.temperature, config.top_p, config.do_sample) == (0.8, 0.9, True)
    assert config.ignored_keys == ("num_beams",)
    write(temperature=1e-300, min_p=0, repetition_penalty=1e-20)
    assert read_generation_config(tmp_path, 100).temperature == 1e-300
    for wrong in (
        {"eos_token_id": 100}, {"temperature": "hot"}, {"top_p": 1.5}, {"top_k": 1.5},
        {"temperature": -1e-10}, {"top_p": 1e-45}, {"top_p": 0}, {"min_p": 1e-40},
        {"min_p": -1e-10}, {"repetition_penalty": 1e-39}, {"repetition_penalty": 1e39},
    ):  # fmt: skip
        write(**wrong)
        with pytest.raises(RejectedError, match=next(iter(wrong))):
            read_generation_config(tmp_path, 100)
