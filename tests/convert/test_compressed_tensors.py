"""Checkpoints made by the compressed-tensors library: kept exactly, or dequantized as it does.

`data/make_compressed_tensors.py` made the fixtures. The float64 reference here is written from the
format's description and shares nothing with the converter.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from numpy.typing import NDArray

from apertus_mlx.backend.mlx import load_model
from apertus_mlx.convert.check.verify import verify
from apertus_mlx.convert.job import Job, convert, prepare
from apertus_mlx.convert.plan.planning import make_plan
from apertus_mlx.convert.plan.policy import Request
from apertus_mlx.errors import RejectedError, UsageError
from apertus_mlx.quant.spec import QuantSpec
from tests import convert_builders as build
from tests.daily import every

FIXTURES = Path(__file__).parents[1] / "data" / "compressed_tensors"
INTEGERS = sorted(
    path.stem for pattern in ("int*", "bytes*") for path in FIXTURES.glob(f"{pattern}.safetensors")
)
ALL = sorted(path.stem for path in FIXTURES.glob("*.safetensors"))
MODULES = [f"model.layers.{layer}.mlp.up_proj" for layer in range(2)]


def fixture(name: str) -> tuple[dict[str, build.Raw], list[build.Raw], dict[str, Any]]:
    """Tensors, what the library decompresses them to, and the quantization_config."""
    path = FIXTURES / f"{name}.safetensors"
    tensors = build.read_safetensors(path)
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    golden = [tensors.pop(f"golden.{layer}") for layer in range(2)]
    made_of = json.loads(header["__metadata__"]["fixture"])
    return tensors, golden, made_of["quantization_config"]


def checkpoint(directory: Path, name: str) -> Path:
    tensors, _, quantization = fixture(name)
    values = build.config(intermediate_size=16, vocab_size=352, quantization_config=quantization)
    plain = build.random_tensors(values)
    for module in MODULES:
        del plain[f"{module}.weight"]
    return build.write_checkpoint(directory, values, plain | tensors)


def planned(name: str, tmp_path: Path, request: Request) -> Job:
    return prepare(checkpoint(tmp_path / "in", name), request, "x")


def reference(name: str, module: str) -> NDArray[np.float64]:
    """`(code - zero) * scale` and its like in float64, code by code from the bits."""
    tensors, _, quantization = fixture(name)
    arguments = quantization["config_groups"]["group_0"]["weights"]
    rows, columns = 16, 128
    if name.startswith("float8"):
        codes = np.frombuffer(tensors[f"{module}.weight"].data, np.uint8).reshape(rows, columns)
        return e4m3(codes) * build.floats(tensors[f"{module}.weight_scale"]).reshape(-1, 1)
    if name == "nvfp4":
        packed = np.frombuffer(tensors[f"{module}.weight_packed"].data, np.uint8)
        codes = np.stack([packed & 15, packed >> 4], -1).reshape(rows, columns)
        table = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        values = np.where(codes & 8, -1, 1) * table[codes & 7]
        scales = np.frombuffer(tensors[f"{module}.weight_scale"].data, np.uint8)
        divisor = build.floats(tensors[f"{module}.weight_global_scale"])
        return values * np.repeat(e4m3(scales).reshape(rows, -1), 16, 1) / divisor
    bits = arguments["num_bits"]
    if name.startswith("bytes"):
        codes = np.frombuffer(tensors[f"{module}.weight"].data, np.int8).astype(int)
        codes = codes.reshape(rows, columns)
        zeros = np.zeros((rows, 1))
        if not arguments["symmetric"]:
            zeros = np.frombuffer(tensors[f"{module}.weight_zero_point"].data, np.int8)[:, None]
        return (codes - zeros) * build.floats(tensors[f"{module}.weight_scale"])
    aligned = name.endswith("_aligned")
    codes = unpack(tensors[f"{module}.weight_packed"], bits, columns, aligned)
    scales = build.floats(tensors[f"{module}.weight_scale"])
    zeros = np.full(scales.shape, 1 << (bits - 1))
    if not arguments["symmetric"]:
        stored = tensors[f"{module}.weight_zero_point"]
        words = np.frombuffer(stored.data, np.int32).reshape(stored.shape).T
        turned = build.Raw("I32", words.shape, np.ascontiguousarray(words).tobytes())
        zeros = unpack(turned, bits, rows, aligned).T
    size = columns // scales.shape[1]
    return (codes - np.repeat(zeros, size, 1)) * np.repeat(scales, size, 1)


def unpack(tensor: build.Raw, bits: int, count: int, aligned: bool) -> NDArray[np.int64]:
    rows = []
    for row in np.frombuffer(tensor.data, np.uint32).reshape(tensor.shape):
        number = sum(int(word) << (32 * index) for index, word in enumerate(row))
        per_word = 32 // bits
        starts = [
            32 * (i // per_word) + bits * (i % per_word) if aligned else bits * i
            for i in range(count)
        ]
        rows.append([number >> start & ((1 << bits) - 1) for start in starts])
    return np.array(rows)


def e4m3(codes: NDArray[np.uint8]) -> NDArray[np.float64]:
    exponent, mantissa = (codes >> 3 & 15).astype(int), (codes & 7).astype(float)
    size = np.where(
        exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    )
    return np.where(codes & 128, -size, size)


def test_there_is_a_fixture_for_every_scheme() -> None:
    assert len(INTEGERS) == 34
    for bits in (2, 3, 4, 6, 8):
        for symmetric in ("symmetric", "asymmetric"):
            assert f"int{bits}_{symmetric}_channel" in INTEGERS
    assert sum(name.endswith("_aligned") for name in INTEGERS) == 12


@pytest.mark.parametrize("name", every(3, INTEGERS))
def test_integer_codes_are_kept_exactly(name: str, tmp_path: Path) -> None:
    job = planned(name, tmp_path, Request())
    convert(job, tmp_path / "out")
    found = build.read_folder(tmp_path / "out")
    for module in MODULES:
        spec = job.plan.specs[module]
        parts = [found[f"{module}.{part}"] for part in ("weight", "scales", "biases")]
        ours = build.dequantize_affine(*parts, spec.bits, spec.group_size)
        assert np.array_equal(ours, reference(name, module))
        assert parts[1].dtype == ("F32" if "asymmetric" in name else "BF16")
    assert not [step.loss for step in job.plan.steps if step.loss]


@pytest.mark.parametrize("name", every(3, INTEGERS))
def test_mlx_lm_and_mlx_read_the_kept_codes(name: str, tmp_path: Path) -> None:
    job = planned(name, tmp_path, Request())
    convert(job, tmp_path / "out")
    found = build.read_folder(tmp_path / "out")
    for module in MODULES:
        spec = job.plan.specs[module]
        parts = [build.as_mlx(found[f"{module}.{p}"]) for p in ("weight", "scales", "biases")]
        values = mx.dequantize(
            parts[0], *(part.astype(mx.float32) for part in parts[1:]),
            group_size=spec.group_size, bits=spec.bits,
        )  # fmt: skip
        expected = reference(name, module)
        # float32: scale * code and the sum are rounded once each.
        assert np.allclose(np.array(values), expected, rtol=0, atol=np.abs(expected).max() * 2e-7)


def test_mlx_lm_computes_with_them(tmp_path: Path) -> None:
    pytest.importorskip("mlx_lm")
    from mlx_lm.utils import load_model

    convert(planned("int4_symmetric_64", tmp_path, Request()), tmp_path / "out")
    convert(
        prepare(tmp_path / "in", Request(dequantize=True, dtype="F32"), "x"), tmp_path / "plain"
    )
    logits = []
    for folder in ("out", "plain"):
        model, _ = load_model(tmp_path / folder)
        model.set_dtype(mx.float32)
        logits.append(np.array(model(mx.array([[1, 70, 200, 320]]))))
    assert np.abs(logits[0] - logits[1]).max() < 1e-4


@pytest.mark.parametrize("name", [name for name in ALL if name.startswith("float8")])
def test_float8_codes_are_kept_exactly_with_a_factor_beside_them(name: str, tmp_path: Path) -> None:
    job = planned(name, tmp_path, Request())
    assert any(step.factor is not None for step in job.plan.steps)
    convert(job, tmp_path / "out")
    found = build.read_folder(tmp_path / "out")
    for module in MODULES:
        assert job.plan.specs[module] == QuantSpec(8, 32, "mxfp8")
        scales = np.frombuffer(found[f"{module}.scales"].data, np.uint8)
        assert (scales == 127).all()
        codes = np.frombuffer(found[f"{module}.weight"].data, np.uint8).reshape(16, 128)
        factor = build.floats(found[f"{module}.output_scale"]).reshape(-1, 1)
        assert np.array_equal(e4m3(codes) * factor, reference(name, module))
        values = mx.dequantize(
            build.as_mlx(found[f"{module}.weight"]), build.as_mlx(found[f"{module}.scales"]),
            mode="mxfp8", group_size=32, bits=8, dtype=mx.float32,
        )  # fmt: skip
        assert np.array_equal(np.array(values), e4m3(codes))


def test_nvfp4_codes_are_kept_exactly_with_a_divisor_beside_them(tmp_path: Path) -> None:
    job = planned("nvfp4", tmp_path, Request())
    convert(job, tmp_path / "out")
    found = build.read_folder(tmp_path / "out")
    for module in MODULES:
        values = mx.dequantize(
            build.as_mlx(found[f"{module}.weight"]), build.as_mlx(found[f"{module}.scales"]),
            mode="nvfp4", group_size=16, bits=4, dtype=mx.float32,
        )  # fmt: skip
        divisor = build.floats(found[f"{module}.output_divisor"])
        ours = np.array(values).astype(np.float64) / divisor
        assert np.array_equal(ours, reference("nvfp4", module))


@pytest.mark.parametrize("name", ["float8_channel", "float8_tensor", "nvfp4", "int3_symmetric_32"])
def test_the_runtime_computes_with_kept_codes(name: str, tmp_path: Path) -> None:
    """Factors included, a kept folder gives the logits of the dequantized one."""
    convert(planned(name, tmp_path, Request()), tmp_path / "out")
    plain = prepare(tmp_path / "in", Request(dequantize=True, dtype="F32"), "x")
    convert(plain, tmp_path / "plain")
    ids = mx.array([[1, 70, 200, 320]])
    kept, expected = (np.array(load_model(tmp_path / f, "float32")(ids)) for f in ("out", "plain"))
    assert np.abs(kept - expected).max() <= 2e-5 * expected.std()
    assert not [
        finding for finding in verify(tmp_path / "out").findings if finding.level == "error"
    ]


@pytest.mark.parametrize("name", every(2, ALL))
def test_dequantized_values_are_those_of_the_library(name: str, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "in", name)
    convert(prepare(source, Request(dequantize=True), "x"), tmp_path / "out")
    found = build.read_folder(tmp_path / "out")
    _, golden, _ = fixture(name)
    for module, library in zip(MODULES, golden, strict=True):
        ours = found[f"{module}.weight"]
        assert ours.dtype == library.dtype == "BF16"
        exact = reference(name, module)
        assert ours == build.raw(exact.astype(np.float32), "BF16")
        if name == "nvfp4":
            # The library rounds scale / divisor to bfloat16 first.
            assert np.allclose(build.floats(ours), build.floats(library), rtol=2**-6, atol=0)
        else:
            assert np.array_equal(build.floats(ours), build.floats(library))


@pytest.mark.parametrize("name", every(4, INTEGERS))
def test_rounded_scales_are_a_loss_that_the_plan_states(name: str, tmp_path: Path) -> None:
    job = planned(name, tmp_path, Request(dtype="BF16"))
    losses = {step.path: step.loss for step in job.plan.steps if step.loss}
    assert bool(losses) == ("asymmetric" in name)
    convert(job, tmp_path / "out")
    found = build.read_folder(tmp_path / "out")
    for module in MODULES:
        spec = job.plan.specs[module]
        parts = [found[f"{module}.{part}"] for part in ("weight", "scales", "biases")]
        assert parts[1].dtype == "BF16"
        ours = build.dequantize_affine(*parts, spec.bits, spec.group_size)
        exact = reference(name, module)
        if "asymmetric" not in name:
            assert np.array_equal(ours, exact)
        else:
            # The bias has at most the size of the whole range of codes.
            limit = 2**-8 * np.repeat(np.abs(build.floats(parts[2])), spec.group_size, 1)
            assert (np.abs(ours - exact) <= limit * 1.01).all()


def test_bits_need_a_decision(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "in", "int4_symmetric_64")
    with pytest.raises(RejectedError, match="--requantize"):
        prepare(source, Request(QuantSpec(3, 64)), "x")
    with pytest.raises(UsageError, match="--bits"):
        prepare(source, Request(requantize=True), "x")
    job = prepare(source, Request(QuantSpec(3, 64), requantize=True), "x")
    assert job.plan.specs[MODULES[0]] == QuantSpec(3, 64)
    assert any("codes are given up" in note for note in job.plan.notes)
    convert(job, tmp_path / "out")
    same = prepare(source, Request(QuantSpec(4, 64), requantize=True), "x")
    steps = {step.path: step.transform for step in same.plan.steps}
    assert steps[MODULES[0]] == "keep"
    assert steps["model.embed_tokens"] == "quantize"


@pytest.mark.parametrize("name", ["float8_channel", "float8_tensor", "nvfp4"])
def test_what_was_kept_with_a_factor_converts_again(name: str, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "in", name)
    convert(prepare(source, Request(), "x"), tmp_path / "kept")
    convert(prepare(tmp_path / "kept", Request(), "x"), tmp_path / "again")
    assert build.read_folder(tmp_path / "kept") == build.read_folder(tmp_path / "again")
    request = Request(dequantize=True, dtype="F32")
    convert(prepare(tmp_path / "kept", request, "x"), tmp_path / "plain")
    found = build.read_folder(tmp_path / "plain")
    for module in MODULES:
        values = build.floats(found[f"{module}.weight"])
        assert np.allclose(values, reference(name, module), rtol=2**-22, atol=0)


def test_activation_order_is_named_and_its_values_are_kept(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "in", "int4_symmetric_64")
    tensors = build.read_folder(source)
    name = f"{MODULES[0]}.weight_g_idx"
    order = np.arange(128, dtype=np.int32) // 64
    for plain in (order, np.full(128, -1, np.int32)):
        tensors[name] = build.raw(plain)
        build.write_safetensors(source / "model.safetensors", tensors)
        steps = {step.path: step for step in prepare(source, Request(), "x").plan.steps}
        assert steps[MODULES[0]].transform == "keep"
    shuffled = np.random.default_rng(0).permutation(order)
    tensors[name] = build.raw(shuffled)
    build.write_safetensors(source / "model.safetensors", tensors)
    with pytest.raises(RejectedError, match=r"up_proj.*act-order.*--dequantize"):
        prepare(source, Request(), "x")
    convert(prepare(source, Request(dequantize=True, dtype="F32"), "x"), tmp_path / "out")
    found = build.floats(build.read_folder(tmp_path / "out")[f"{MODULES[0]}.weight"])
    words = np.frombuffer(tensors[f"{MODULES[0]}.weight_packed"].data, np.uint32).reshape(16, -1)
    codes = (words[:, :, None] >> (4 * np.arange(8, dtype=np.uint32)) & 15).reshape(16, 128)
    scales = build.floats(tensors[f"{MODULES[0]}.weight_scale"])
    assert np.array_equal(found, (codes.astype(float) - 8) * scales[:, shuffled])


@pytest.mark.parametrize("structure", [[0, 128], [128], "axb", None, [-1, 2], [1.5, 2], "1x"])
def test_blocks_without_two_sizes(tmp_path: Path, structure: object) -> None:
    source = checkpoint(tmp_path / "in", "float8_channel")
    config = json.loads((source / "config.json").read_text())
    for group in config["quantization_config"]["config_groups"].values():
        group["weights"] |= {"strategy": "block", "block_structure": structure}
    build.write_json(source / "config.json", config)
    with pytest.raises(RejectedError, match="block_structure"):
        prepare(source, Request(), "x")


@pytest.mark.parametrize("size", [[16, 64], [128, 128], [7, 33]])
def test_fine_grained_float8(tmp_path: Path, size: list[int]) -> None:
    """The blocks of transformers' `fp8`, whose edges may be smaller."""
    block = {"quant_method": "fp8", "weight_block_size": size, "activation_scheme": "dynamic"}
    values = build.config(quantization_config=block)
    tensors = build.random_tensors(values)
    rng = np.random.default_rng(0)
    name = "model.layers.1.mlp.down_proj"
    rows, columns = tensors[f"{name}.weight"].shape
    codes = rng.integers(0, 127, (rows, columns), dtype=np.uint8)
    scales = rng.uniform(0.01, 1, (-(-rows // size[0]), -(-columns // size[1])))
    tensors[f"{name}.weight"] = build.Raw("F8_E4M3", codes.shape, codes.tobytes())
    tensors[f"{name}.weight_scale_inv"] = build.raw(scales, "F32")
    source = build.write_checkpoint(tmp_path / "in", values, tensors)
    with pytest.raises(RejectedError, match=f"a scale per {size[0]} x {size[1]} weights"):
        prepare(source, Request(), "x")
    convert(prepare(source, Request(dequantize=True, dtype="F32"), "x"), tmp_path / "out")
    found = build.floats(build.read_folder(tmp_path / "out")[f"{name}.weight"])
    wide = np.repeat(np.repeat(scales, size[0], 0)[:rows], size[1], 1)[:, :columns]
    assert np.allclose(found, e4m3(codes) * wide, rtol=1e-6, atol=0)
    for wrong in ([128], None, [0, 128], [128, "128"], 128):
        broken = {**values, "quantization_config": block | {"weight_block_size": wrong}}
        build.write_json(source / "config.json", broken)
        with pytest.raises(RejectedError, match="weight_block_size"):
            prepare(source, Request(), "x")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "marlin-24"}, "marlin-24"),
        ({"config_groups": {}}, "config_groups"),
        ({"sparsity_config": {"format": "x"}}, "sparsity"),
        ({"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        ({"config_groups": {"group_0": {"weights": {"num_bits": "4"}}}}, "num_bits"),
        ({"config_groups": {"group_0": {"weights": {"num_bits": 5, "type": "int"}}}}, "no group"),
    ],
)
def test_unknown_schemes_are_refused_by_name(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    source = checkpoint(tmp_path / "in", "int4_symmetric_64")
    values = json.loads((source / "config.json").read_text())
    values["quantization_config"].update(change)
    build.write_json(source / "config.json", values)
    with pytest.raises(RejectedError, match=message):
        prepare(source, Request(), "x")


def test_nan_codes_are_refused(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "in", "float8_channel")
    tensors = build.read_folder(source)
    broken = tensors[f"{MODULES[1]}.weight"]
    tensors[f"{MODULES[1]}.weight"] = build.Raw(
        broken.dtype, broken.shape, b"\x7f" + broken.data[1:]
    )
    build.write_safetensors(source / "model.safetensors", tensors)
    with pytest.raises(RejectedError, match="NaN"):
        convert(prepare(source, Request(), "x"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [name for name in ALL if not name.endswith("_aligned")])
def test_the_library_here_decompresses_the_fixtures_the_same(name: str) -> None:
    """The golden values are still what an installed library computes."""
    pytest.importorskip("compressed_tensors", minversion="0.15")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from safetensors.torch import load_file

    tensors = load_file(FIXTURES / f"{name}.safetensors")
    _, _, quantization = fixture(name)
    arguments = QuantizationArgs(**quantization["config_groups"]["group_0"]["weights"])
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    compressor = BaseCompressor.get_value_from_registry(quantization["format"])
    for layer, module in enumerate(MODULES):
        state = {
            key.removeprefix(f"{module}."): value
            for key, value in tensors.items()
            if key.startswith(module)
        }
        values = compressor.decompress(state, scheme)["weight"]
        assert (values == tensors[f"golden.{layer}"]).all()


def test_planning_reads_headers_only(tmp_path: Path) -> None:
    job = planned("int4_symmetric_64", tmp_path, Request())
    assert make_plan(job.plan.source, Request()).fingerprint() == job.plan.fingerprint()


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize(
    "name", ["int3_symmetric_32", "int4_asymmetric_64", "int8_symmetric_channel"]
)
def test_scales_of_every_size(name: str, dtype: str, tmp_path: Path) -> None:
    """Every exponent, subnormals too: exact, or refused where the bias has no number."""
    source = checkpoint(tmp_path / "in", name)
    tensors = build.read_folder(source)
    rng = np.random.default_rng(5)
    exponents = {"BF16": (-133, 120), "F16": (-24, 8), "F32": (-140, 120)}[dtype]
    expected = {}
    for module in MODULES:
        stored = tensors[f"{module}.weight_scale"]
        size = np.ldexp(rng.uniform(0.5, 1, stored.shape), rng.integers(*exponents, stored.shape))
        tensors[f"{module}.weight_scale"] = scale = build.raw(size, dtype)
        old = np.repeat(build.floats(stored), 128 // stored.shape[1], 1)
        new = np.repeat(build.floats(scale), 128 // stored.shape[1], 1)
        expected[module] = reference(name, module) / old * new
    build.write_safetensors(source / "model.safetensors", tensors)
    convert(prepare(source, Request(), "x"), tmp_path / "out")
    found = build.read_folder(tmp_path / "out")
    for module, values in expected.items():
        spec = QuantSpec(int(name[3]), 128 if "channel" in name else int(name.rsplit("_")[-1]))
        parts = [found[f"{module}.{part}"] for part in ("weight", "scales", "biases")]
        ours = build.dequantize_affine(*parts, spec.bits, spec.group_size)
        # The reference divides and multiplies in float64; codes are integers, so round to them.
        tolerance = 1e-12 if "asymmetric" not in name or dtype != "F32" else 2**-20
        scale = np.repeat(np.abs(build.floats(parts[1])), spec.group_size, 1)
        assert (np.abs(ours - values) <= tolerance * 256 * scale + 1e-300).all()


def test_a_bias_beyond_the_type_of_the_scales_is_refused(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "in", "int8_symmetric_channel")
    tensors = build.read_folder(source)
    name = f"{MODULES[0]}.weight_scale"
    tensors[name] = build.raw(np.full((16, 1), 60000.0), "F16")
    build.write_safetensors(source / "model.safetensors", tensors)
    with pytest.raises(RejectedError, match="scales too large"):
        convert(prepare(source, Request(), "x"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
