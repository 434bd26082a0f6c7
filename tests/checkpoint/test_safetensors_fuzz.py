"""Whatever the safetensors library rejects, we reject; and nothing but a refusal comes out."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from apertus_mlx.checkpoint.config import parse_config
from apertus_mlx.checkpoint.header import parse_header, read_header
from apertus_mlx.checkpoint.tensors import merge_headers, open_checkpoint, read_weight_map
from apertus_mlx.convert.job import prepare
from apertus_mlx.convert.plan.policy import Request
from apertus_mlx.convert.sources.recognise import recognise
from apertus_mlx.errors import ApertusError, RejectedError
from apertus_mlx.quant.spec import QuantSpec
from apertus_mlx.system.strict_json import parse_object
from tests import convert_builders as build
from tests.daily import every

RELAXED = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
NUMBERS = st.one_of(
    st.integers(-4, 40),
    st.sampled_from([2**31 - 1, 2**31, 2**32, 2**63, 2**64, -(2**63), 1.0, 1.5, 1e30]),
)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=8)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)
DTYPES = st.sampled_from(
    ["F32", "BF16", "F16", "U8", "I64", "BOOL", "F8_E4M3", "F4", "F6_E2M3", "C64", "f32", "", "X"]
)
ENTRY = st.one_of(
    st.fixed_dictionaries(
        {
            "dtype": st.one_of(DTYPES, JSON),
            "shape": st.one_of(st.lists(NUMBERS, max_size=3), JSON),
            "data_offsets": st.one_of(st.lists(NUMBERS, min_size=2, max_size=2), JSON),
        }
    ),
    JSON,
)


def ours(path: Path) -> bool:
    try:
        read_header(path)
    except RejectedError:
        return False
    return True


def theirs(path: Path) -> bool:
    try:
        with safe_open(path, framework="np"):
            return True
    except (SafetensorError, OSError, ValueError):
        return False


def check(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    if ours(path):
        assert theirs(path)


def file(header: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


@given(header=st.dictionaries(st.text(max_size=6), ENTRY, max_size=4), size=st.integers(0, 64))
@RELAXED
def test_random_headers(header: dict[str, Any], size: int, tmp_path: Path) -> None:
    raw = json.dumps(header).encode()
    check(tmp_path / "x.safetensors", file(raw, bytes(size)))
    try:
        parse_header(raw, 8 + len(raw) + size, "x", "x")
    except RejectedError as error:
        assert "\n" not in str(error)


@given(content=st.binary(max_size=200))
@RELAXED
def test_random_bytes(content: bytes, tmp_path: Path) -> None:
    check(tmp_path / "x.safetensors", content)
    check(tmp_path / "x.safetensors", file(content, b""))
    check(tmp_path / "x.safetensors", file(b"{" + content, b"1234"))


@pytest.mark.parametrize("count", every(2, [1000, 5000]))
def test_mutated_files(count: int, tmp_path: Path) -> None:
    """A sound file with bytes flipped, cut, doubled or replaced by telling ones."""
    path = tmp_path / "x.safetensors"
    tensors = {
        "a": build.raw(np.arange(6.0).reshape(2, 3), "F32"),
        "b": build.raw(np.arange(4.0), "BF16"),
        "c": build.raw(np.float32(1), "F16"),
    }
    build.write_safetensors(path, tensors, {"format": "pt"})
    sound = path.read_bytes()
    assert ours(path)
    rng = random.Random(1)
    pieces = [b"-", b"1e9", b"18446744073709551615", b"4294967296", b'"', b"{", b"}", b"[", b"\x00",
              b"\xff", b'"a":', b'"__metadata__":', b"null", b"1.0", b"  ", b"\\u0000"]  # fmt: skip
    accepted = 0
    for _ in range(count):
        content = bytearray(sound)
        for _ in range(rng.randint(1, 3)):
            place = rng.randrange(len(content))
            choice = rng.random()
            if choice < 0.4:
                content[place] = rng.randrange(256)
            elif choice < 0.6:
                del content[place : place + rng.randint(1, 8)]
            elif choice < 0.8:
                content[place:place] = rng.choice(pieces)
            else:
                piece = rng.choice(pieces)
                content[place : place + len(piece)] = piece
            if not content:
                break
        if rng.random() < 0.5 and len(content) > 16:
            # Keep the declared length right, so that the header itself is reached.
            end = content.rfind(b"}") + 1
            content[:8] = struct.pack("<Q", max(end - 8, 0))
        check(path, bytes(content))
        accepted += ours(path)
    assert accepted > 0


@given(values=st.dictionaries(st.text(max_size=12), JSON, max_size=6))
@RELAXED
def test_random_indexes(values: dict[str, Any]) -> None:
    for index in (values, {"weight_map": values}):
        try:
            weight_map = read_weight_map(parse_object(json.dumps(index).encode(), "index"), "index")
            merge_headers({}, weight_map, "x")
        except RejectedError as error:
            assert "\n" not in str(error)


@given(
    changes=st.dictionaries(st.sampled_from(sorted(build.config())), JSON, max_size=3),
    extra=st.dictionaries(
        st.sampled_from(
            ["rope_parameters", "head_dim", "quantization", "quantization_config", "text_config",
             "output_vocab_size", "dtype", "zzz"]
        ),
        JSON,
        max_size=2,
    ),
)  # fmt: skip
@RELAXED
def test_random_configs_are_read_or_refused(changes: dict[str, Any], extra: dict[str, Any]) -> None:
    values = build.config() | changes | extra
    try:
        config = parse_config(parse_object(json.dumps(values).encode(), "config.json"))
        recognise(config, {}, "x")
    except RejectedError as error:
        assert "\n" not in str(error)


QUANTIZATION = st.fixed_dictionaries(
    {},
    optional={
        "quant_method": st.sampled_from(["compressed-tensors", "gptq", "awq", "fp8", ""]),
        "format": st.sampled_from(["pack-quantized", "float-quantized", "nvfp4-pack-quantized", 3]),
        "bits": NUMBERS,
        "group_size": NUMBERS,
        "sym": JSON,
        "version": JSON,
        "checkpoint_format": JSON,
        "config_groups": st.dictionaries(
            st.text(max_size=4),
            st.fixed_dictionaries(
                {
                    "weights": st.fixed_dictionaries(
                        {},
                        optional={
                            "num_bits": NUMBERS,
                            "group_size": NUMBERS,
                            "strategy": st.sampled_from(["group", "channel", "tensor", "block", 1]),
                            "symmetric": JSON,
                            "type": st.sampled_from(["int", "float", 0]),
                        },
                    )
                }
            )
            | JSON,
            max_size=2,
        ),
    },
)


@pytest.fixture(scope="module")
def packed_tensors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Headers of a checkpoint with a packed, an 8-bit and a transposed matrix."""
    directory = tmp_path_factory.mktemp("packed")
    tensors = build.random_tensors(build.config())
    for index in range(2):
        path = f"model.layers.{index}.mlp.up_proj"
        del tensors[f"{path}.weight"]
    tensors["model.layers.0.mlp.up_proj.weight_packed"] = build.raw(np.zeros((256, 16), np.int32))
    tensors["model.layers.0.mlp.up_proj.weight_scale"] = build.raw(np.ones((256, 2)), "BF16")
    tensors["model.layers.1.mlp.up_proj.qweight"] = build.raw(np.zeros((16, 256), np.int32))
    tensors["model.layers.1.mlp.up_proj.qzeros"] = build.raw(np.zeros((2, 32), np.int32))
    tensors["model.layers.1.mlp.up_proj.scales"] = build.raw(np.ones((2, 256)), "F16")
    build.write_checkpoint(directory, tensors=tensors)
    return dict(open_checkpoint(directory).tensors)


@given(block=QUANTIZATION)
@RELAXED
def test_random_quantization_blocks_are_read_or_refused(
    block: dict[str, Any], packed_tensors: dict[str, Any]
) -> None:
    values = build.config(quantization_config=block)
    try:
        config = parse_config(parse_object(json.dumps(values).encode(), "config.json"))
        recognise(config, packed_tensors, "x")
    except RejectedError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("count", every(2, [60, 300]))
def test_mutated_checkpoints_are_planned_or_refused(count: int, tmp_path: Path) -> None:
    source = build.write_checkpoint(tmp_path / "in", shards=2)
    names = ["config.json", "model.safetensors.index.json", "tokenizer.json",
             "generation_config.json", "model-00001-of-00002.safetensors"]  # fmt: skip
    sound = {name: (source / name).read_bytes() for name in names}
    rng = random.Random(2)
    refused = 0
    for _ in range(count):
        name = rng.choice(names)
        content = bytearray(sound[name])
        limit = min(len(content), 2000)
        for _ in range(rng.randint(1, 4)):
            content[rng.randrange(limit)] = rng.randrange(256)
        (source / name).write_bytes(content)
        try:
            prepare(source, Request(QuantSpec(4, 64)), "x")
        except ApertusError as error:
            refused += 1
            assert "\n" not in str(error)
        (source / name).write_bytes(sound[name])
    assert refused > count / 3
