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
    ({"quantization": {"bits": 4, "group_size": "64"}}, "group_size"),
    ({"quantization": {"bits": 8, "group_size": None, "mode": "nvfp4"}}, "nvfp4 has 4 bits"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ({"layer_types": "full_attention"}, "layer_types"),
    ({"pruned_heads": {"0": [1]}}, "pruned_heads"),
    ({"is_causal": False}, "is_causal"),
    ({"pad_token_id": -2}, "pad_token_id"),
    ({"rope_type": "yarn", "factor": 2.0}, "yarn"),
    ({"rope_type": "llama3", "factor": 8.0}, "low_freq_factor: required"),
    ({"rope_type": "default", "rope_scaling": LLAMA3}, "disagree"),
    ({"rope_scaling": {**LLAMA3, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ({"factor": 8.0}, "unknown key 'factor'"),
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


# What transformers 4 writes for any model when it writes everything, and what it reads as nothing.
TRANSFORMERS_4 = {
    "return_dict": True, "output_hidden_states": False, "torchscript": False, "use_bfloat16": False,
    "tf_legacy_loss": False, "pruned_heads": {}, "chunk_size_feed_forward": 0, "is_decoder": False,
    "is_encoder_decoder": False, "cross_attention_hidden_size": None, "add_cross_attention": False,
    "tie_encoder_decoder": False, "max_length": 20, "min_length": 0, "do_sample": False,
    "early_stopping": False, "num_beams": 1, "num_beam_groups": 1, "diversity_penalty": 0.0,
    "temperature": 1.0, "top_k": 50, "top_p": 1.0, "typical_p": 1.0, "repetition_penalty": 1.0,
    "length_penalty": 1.0, "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0,
    "bad_words_ids": None, "num_return_sequences": 1, "output_scores": False,
    "return_dict_in_generate": False, "forced_bos_token_id": None, "forced_eos_token_id": None,
    "remove_invalid_values": False, "exponential_decay_length_penalty": None,
    "suppress_tokens": None, "begin_suppress_tokens": None, "finetuning_task": None,
    "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "tokenizer_class": None,
    "prefix": None, "sep_token_id": None, "decoder_start_token_id": None,
    "task_specific_params": None, "problem_type": None, "_name_or_path": "x",
    "_attn_implementation_autoset": True, "output_attentions": False,
}  # fmt: skip
HARMLESS: list[dict[str, Any]] = [
    TRANSFORMERS_4,
    {"unsloth_version": "2026.8.1", "unsloth_fixed": True, "pad_token_id": 3},
    {"layer_types": ["full_attention"] * 2, "is_causal": True, "use_return_dict": True},
    {"num_experts": None, "final_logit_softcapping": None, "attention_sinks": None},
    {"gradient_checkpointing": False, "loss_type": "ForCausalLM"},
    {"rope_type": "default"},
    {"rope_parameters": {"rope_theta": 500000, "partial_rotary_factor": 1.0, "factor": None}},
]


@pytest.mark.parametrize("keys", HARMLESS, ids=lambda keys: next(iter(keys)))
def test_keys_that_change_nothing(keys: dict[str, Any]) -> None:
    assert parse_config(config_4x(**keys)) == parse_config(config_4x())


def test_padding_of_minus_one_is_none() -> None:
    assert parse_config(config_4x(pad_token_id=-1)) == parse_config(config_4x(pad_token_id=None))


def test_rope_dissolved_into_the_model_is_the_same_rope() -> None:
    """AutoRound's MLX export does that to `rope_parameters`; mlx-lm then forgets the scaling."""
    flat = {key: value for key, value in LLAMA3.items() if key != "type"}
    dissolved = config_4x(rope_scaling=None, **flat)
    assert parse_config(dissolved) == parse_config(config_5x(rope_scaling=LLAMA3))


# What mlx-lm 0.32 writes where a predicate names bits alone, and for other modes.
NULLS = [
    ({"bits": 3, "group_size": None, "mode": "affine"}, QuantSpec(3, 64)),
    ({"bits": 6}, QuantSpec(6, 64)),
    ({"group_size": 32}, QuantSpec(4, 32)),
    ({"mode": "mxfp4"}, QuantSpec(4, 32, "mxfp4")),
    ({"bits": None, "group_size": None, "mode": "nvfp4"}, QuantSpec(4, 16, "nvfp4")),
    ({"bits": 8, "mode": "mxfp8"}, QuantSpec(8, 32, "mxfp8")),
]


@pytest.mark.parametrize(("block", "spec"), NULLS)
def test_bits_and_groups_of_the_mode(block: dict[str, Any], spec: QuantSpec) -> None:
    quantization = {"group_size": 64, "bits": 4, "lm_head": block}
    parsed = parse_config(config_4x(quantization=quantization)).quantization
    assert parsed is not None
    assert parsed.spec_for("lm_head") == spec
    parsed = parse_config(config_4x(quantization=block)).quantization
    assert parsed is not None and parsed.default == spec


@pytest.mark.parametrize("method", [["gptq"], {"gptq": 4}, 4, True])
def test_a_method_is_a_text(method: object) -> None:
    with pytest.raises(RejectedError, match="quantization_config: quant_method: expected a string"):
        parse_config(config_4x(quantization_config={"quant_method": method, "bits": 4}))


def test_autoround_words_for_an_mlx_folder() -> None:
    """`quantization_config` in AutoRound's words, beside MLX's own block."""
    words = {"quant_method": "auto-round", "packing_format": "mlx", "bits": 4, "group_size": 64,
             "sym": True, "data_type": "int"}  # fmt: skip
    block = {"group_size": 64, "bits": 4}
    config = parse_config(config_4x(quantization=block, quantization_config=words))
    assert config == parse_config(config_4x(quantization=block))
    with pytest.raises(RejectedError, match="disagree"):
        parse_config(config_4x(quantization=block, quantization_config={**words, "bits": 3}))
    foreign = parse_config(config_4x(quantization_config={**words, "packing_format": "auto_gptq"}))
    assert foreign.foreign_quantization is not None
    assert foreign.foreign_quantization[0] == "auto-round"
