"""Configs, good and bad, with what the Python reader says of each.

`configs/N.json` are the files, `configs.json` is a list of `{file, accepted}` or `{file, refused}`:
the values, or the message. Where the words are the JSON library's own, `refused` is how it begins.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from apertus_mlx.checkpoint.config import ModelConfig, parse_config
from apertus_mlx.checkpoint.layout import matrices, parameter_count
from apertus_mlx.checkpoint.quantization_block import AT_LOADING
from apertus_mlx.errors import RejectedError
from apertus_mlx.model.apertus import rotary_wavelengths
from apertus_mlx.system.strict_json import parse_object
from tests.builders import LLAMA3, config_4x, config_5x
from tests.checkpoint.test_config import HARMLESS, NULLS, REFUSED, RELEASED
from tests.swift_fixtures.sizes import sized

RANDOM_CONFIGS = sized(1500, 500)
BLOCK = {
    "group_size": 64, "bits": 4, "model.embed_tokens": {"group_size": 32, "bits": 6},
    "lm_head": False, "model.layers.0.mlp.up_proj": {"group_size": 32, "bits": 8, "mode": "mxfp8"},
    "model.layers.1.mlp.up_proj": True,
}  # fmt: skip
AUTOROUND = {"quant_method": "auto-round", "packing_format": "mlx", "bits": 4, "group_size": 64}
DAMAGED = [
    b"", b" \n", b"{", b"[1, 2]", b"5", b'{"hidden_size": 1, "hidden_size": 2}',
    b'{"rms_norm_eps": NaN}', b'{"rms_norm_eps": -Infinity}', b"\xff\xfe{}",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:00", b'{"a":' * 2000, b"{} {}",
    *(b'{"vocab_size": %s}' % (b"1" * digits) for digits in (4300, 4301)),
    b'{"a": -%s}' % (b"1" * 4301),
    b'{"vocab_size": %s.5}' % (b"1" * 5000), b'{"vocab_size": %se-5000}' % (b"1" * 5000),
    b'{"a": 01}', b'{"a": "\n"}', b'{"a": 1,}', b"\xef\xbb\xbf{}",
]  # fmt: skip
GOOD: list[dict[str, Any]] = [
    {}, {"rope_scaling": LLAMA3}, {"rope_scaling": {"type": "linear", "factor": 2}},
    {"rope_scaling": {"rope_type": "default"}}, {"rope_theta": 12000000}, {"rope_theta": 12e6},
    {"head_dim": 32}, {"tie_word_embeddings": True}, {"tie_word_embeddings": None},
    {"quantization": BLOCK}, {"quantization": BLOCK, "quantization_config": BLOCK},
    {"quantization_config": {"group_size": 64, "bits": 4}}, {"output_vocab_size": 100},
    {"quantization": {"group_size": 64, "bits": 4}, "quantization_config": AUTOROUND},
    {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
    {"quantization_config": {**AUTOROUND, "packing_format": "auto_gptq"}},
    {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}},
    {"quantization_config": {"quant_method": "intel/auto-round", "bits": 4, "group_size": 128}},
    {"quantization_config": {"quant_method": "nobody's", "x": 1}},
    {"auto_map": {"AutoModel": "evil.Model"}, "model_file": "evil.py"},
    {"eos_token_id": 68}, {"pad_token_id": -1}, {"torch_dtype": "torch.bfloat16"},
    {"mlp_bias": 0, "qk_norm": 1.0}, {"_comment": "x"}, {"tie_word_embeddings": 1},
    {"model_type": "apertus1p5_text"}, {"rms_norm_eps": 1}, {"quantization": {}},
    {"quantization": {"bits": 4, "group_size": 64, "a": {"bits": 3, "x": 1}}},
]  # fmt: skip
ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 4, 64, 65, 2**31, 2**62, 2**64, 10**30, 0.5, 1.0, 64.0,
    1e-3, 1e300, 1e-45, "", "64", "apertus", "llama3", "default", "x" * 100, "a'b", [], [1], [1, 2],
    ["1"], [None], {}, {"type": "linear"}, {"factor": 2.0}, LLAMA3, {"rope_type": "llama3"},
    {"bits": 4, "group_size": 64}, {"bits": 3}, {"mode": "mxfp4"},
    {"quant_method": "fp8"},
]  # fmt: skip


def write_config_fixtures(out: Path) -> None:
    """Write what is described above."""
    folder = out / "configs"
    folder.mkdir(parents=True, exist_ok=True)
    verdicts = []
    for number, text in enumerate(_texts()):
        (folder / f"{number}.json").write_bytes(text)
        verdicts.append({"file": f"{number}.json", **_verdict(text)})
    (out / "configs.json").write_text(json.dumps(verdicts, ensure_ascii=False), encoding="utf-8")


def _texts() -> Iterator[bytes]:
    yield from DAMAGED
    yield from (json.dumps(values).encode() for values in _values())


def _values() -> Iterator[dict[str, Any]]:
    for changes in [*GOOD, *HARMLESS, *(changes for changes, _ in REFUSED)]:
        yield config_4x(**changes)
        if isinstance(changes.get("rope_scaling"), dict | None):
            yield config_5x(**changes)
    for block, _ in NULLS:
        yield config_4x(quantization=block)
        yield config_4x(quantization={"group_size": 64, "bits": 4, "lm_head": block})
    yield from (config_4x(vocab_size=131072, **changes) for changes in RELEASED.values())
    yield from ({k: v for k, v in config_4x().items() if k != key} for key in config_4x())
    text = config_5x(rope_scaling=LLAMA3)
    for outer in ({}, {"vocab_size": 300}, {"tie_word_embeddings": True}, {"x": 1}):
        yield {"model_type": "apertus", "text_config": text, **outer}
    nested = config_5x(model_type="apertus1p5_text")
    yield {"model_type": "apertus1p5", "text_config": nested, "image_token_id": 5}
    yield {"model_type": "apertus", "text_config": nested}
    rng = random.Random(0)
    keys = [*config_4x(), "head_dim", "rope_parameters", "quantization", "quantization_config",
            "dtype", "output_vocab_size", "rope_type", "factor", "layer_types", "text_config",
            "sliding_window", "partial_rotary_factor", "é", "pruned_heads"]  # fmt: skip
    for _ in range(RANDOM_CONFIGS):
        make, scaling = rng.choice((config_4x, config_5x)), rng.choice((None, LLAMA3))
        base = make(rope_scaling=copy.deepcopy(scaling))
        for _ in range(rng.choice((1, 1, 2, 3))):
            target = rng.choice([base, *(v for v in base.values() if isinstance(v, dict))])
            key = rng.choice([*target, *keys]) if target is base else rng.choice([*target, "x"])
            if rng.random() < 0.1:
                target.pop(key, None)
            else:
                target[key] = copy.deepcopy(rng.choice(ODD))
        yield base


def _verdict(text: bytes) -> dict[str, Any]:
    try:
        config = parse_config(parse_object(text, "config.json"), "config.json")
    except RejectedError as error:
        return {"refused": _own_words(str(error))}
    if config.family != "apertus":
        return {"refused": "config.json: model_type: "}
    if config.foreign_quantization and config.foreign_quantization[0] not in AT_LOADING:
        return {"quantized_by": config.foreign_quantization[0]}
    return {"accepted": _read(config)}


def _own_words(message: str) -> str:
    if "JSON" in message or "nested too deeply" in message:
        return message.partition(" (")[0].partition(", found")[0]
    return message


def _read(config: ModelConfig) -> dict[str, Any]:
    values = asdict(replace(config, quantization=None, foreign_quantization=None))
    values["rope"] = asdict(config.rope)
    values["wavelengths"] = rotary_wavelengths(config.head_dim, config.rope)[:64]
    values["parameters"] = parameter_count(config)
    if config.quantization is not None:
        paths = {matrix.path for matrix in matrices(config)} | set(config.quantization.overrides)
        formats = {path: config.quantization.spec_for(path) for path in sorted(paths)}
        values["formats"] = {path: spec and asdict(spec) for path, spec in formats.items()}
    return values
