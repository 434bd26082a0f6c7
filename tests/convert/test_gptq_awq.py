"""GPTQ and AWQ checkpoints, packed here code by code from the formats' descriptions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from apertus_mlx.convert.job import convert, prepare
from apertus_mlx.convert.plan.policy import Request
from apertus_mlx.errors import RejectedError
from apertus_mlx.quant.spec import QuantSpec
from tests import convert_builders as build
from tests.daily import every

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def pack_rows(codes: NDArray[np.int64], bits: int) -> NDArray[np.int32]:
    """The codes of each row one after the other from the lowest bit on, as 32-bit words."""
    places = codes[:, :, None] >> np.arange(bits) & 1
    stream = places.reshape(len(codes), -1).astype(np.uint8)
    return np.packbits(stream, axis=1, bitorder="little").view("<i4")


def gptq(
    codes: NDArray[np.int64], zeros: NDArray[np.int64], bits: int, version: int
) -> dict[str, NDArray[Any]]:
    """`codes` [out, in] and `zeros` [out, groups] as GPTQ stores them."""
    less = 1 if version == 1 else 0
    return {
        "qweight": np.ascontiguousarray(pack_rows(codes, bits).T),
        "qzeros": pack_rows(zeros.T - less, bits),
        "g_idx": (np.arange(codes.shape[1]) // (codes.shape[1] // zeros.shape[1])).astype(np.int32),
    }


def awq(codes: NDArray[np.int64], zeros: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
    """`codes` [out, in] and `zeros` [out, groups] as AWQ stores them."""

    def interleave(matrix: NDArray[np.int64]) -> NDArray[np.int32]:
        shuffled = matrix.reshape(len(matrix), -1, 8)[:, :, list(ORDER)]
        return pack_rows(shuffled.reshape(len(matrix), -1), 4)

    return {"qweight": interleave(codes.T), "qzeros": interleave(zeros.T)}


def checkpoint(
    directory: Path,
    block: dict[str, Any],
    bits: int,
    group: int,
    pack: Callable[..., dict[str, NDArray[Any]]],
    symmetric: bool = False,
    scale_dtype: str = "F16",
) -> dict[str, NDArray[np.float64]]:
    """Writes the checkpoint; returns what each quantized matrix means, in float64."""
    values = build.config(quantization_config=block)
    tensors = build.random_tensors(values, "F16")
    rng = np.random.default_rng(bits * abs(group))
    meaning = {}
    for name, tensor in list(tensors.items()):
        if "_proj" not in name:
            continue
        rows, columns = tensor.shape
        size = columns if group == -1 else group
        codes = rng.integers(0, 1 << bits, (rows, columns))
        codes[0], codes[1] = 0, (1 << bits) - 1
        zeros = rng.integers(1, 1 << bits, (rows, columns // size))
        if symmetric:
            zeros[:] = 1 << (bits - 1)
        scales = build.raw(rng.uniform(1e-5, 0.1, (columns // size, rows)), scale_dtype)
        path = name.removesuffix(".weight")
        del tensors[name]
        for part, array in pack(codes, zeros).items():
            tensors[f"{path}.{part}"] = build.raw(array)
        tensors[f"{path}.scales"] = scales
        wide = np.repeat(build.floats(scales).T, size, 1)
        meaning[path] = (codes - np.repeat(zeros, size, 1)) * wide
    build.write_checkpoint(directory, values, tensors)
    return meaning


CASES = {
    **{
        f"gptq {bits} bits, groups of {group}, version {version}": (
            {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": False,
             "sym": False, "checkpoint_format": "gptq" if version == 1 else "gptq_v2"},
            bits, group, lambda c, z, b=bits, v=version: gptq(c, z, b, v),
        )
        for bits in (2, 3, 4, 8)
        for group in (32, 128, -1)
        for version in (1, 2)
    },
    **{
        f"awq, groups of {group}": (
            {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm",
             "zero_point": True},
            4, group, awq,
        )
        for group in (32, 64, 128)
    },
}  # fmt: skip


@pytest.mark.parametrize("case", every(3, CASES))
def test_codes_are_kept_exactly(case: str, tmp_path: Path) -> None:
    meaning = checkpoint(tmp_path / "in", *CASES[case])
    job = prepare(tmp_path / "in", Request(), "x")
    assert not [step.loss for step in job.plan.steps if step.loss]
    convert(job, tmp_path / "out")
    found = build.read_folder(tmp_path / "out")
    assert len(meaning) == 12
    for path, expected in meaning.items():
        spec = job.plan.specs[path]
        parts = [found[f"{path}.{part}"] for part in ("weight", "scales", "biases")]
        ours = build.dequantize_affine(*parts, spec.bits, spec.group_size)
        assert np.array_equal(ours, expected)


@pytest.mark.parametrize("case", every(3, CASES))
def test_dequantized(case: str, tmp_path: Path) -> None:
    meaning = checkpoint(tmp_path / "in", *CASES[case])
    convert(prepare(tmp_path / "in", Request(dequantize=True, dtype="F32"), "x"), tmp_path / "out")
    found = build.read_folder(tmp_path / "out")
    for path, expected in meaning.items():
        assert np.array_equal(build.floats(found[f"{path}.weight"]), expected)


def test_symmetric_gptq_keeps_16_bit_scales(tmp_path: Path) -> None:
    block, bits, group, pack = CASES["gptq 4 bits, groups of 128, version 1"]
    meaning = checkpoint(tmp_path / "in", block | {"sym": True}, bits, group, pack, symmetric=True)
    job = prepare(tmp_path / "in", Request(), "x")
    convert(job, tmp_path / "out")
    found = build.read_folder(tmp_path / "out")
    for path, expected in meaning.items():
        assert job.plan.specs[path] == QuantSpec(4, 128)
        parts = [found[f"{path}.{part}"] for part in ("weight", "scales", "biases")]
        assert parts[1].dtype == "F16"
        assert np.array_equal(build.dequantize_affine(*parts, 4, 128), expected)


def test_float32_scales_are_a_loss_that_the_plan_states(tmp_path: Path) -> None:
    meaning = checkpoint(
        tmp_path / "in", *CASES["awq, groups of 64"], symmetric=False, scale_dtype="F32"
    )
    job = prepare(tmp_path / "in", Request(), "x")
    assert any("rounded to float32, relative error up to 6e-8" in note for note in job.plan.notes)
    convert(job, tmp_path / "out")
    found = build.read_folder(tmp_path / "out")
    for path, expected in meaning.items():
        parts = [found[f"{path}.{part}"] for part in ("weight", "scales", "biases")]
        ours = build.dequantize_affine(*parts, 4, 64)
        limit = np.repeat(np.abs(build.floats(parts[2])), 64, 1) * 6e-8
        assert (np.abs(ours - expected) <= limit).all()


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_small_blocks_give_the_same(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from apertus_mlx.convert.sources import reading

    case = next(name for name in CASES if name.startswith(method))
    checkpoint(tmp_path / "in", *CASES[case])
    convert(prepare(tmp_path / "in", Request(), "x"), tmp_path / "whole")
    monkeypatch.setattr(reading, "BLOCK_BYTES", 12_000)
    convert(prepare(tmp_path / "in", Request(), "x"), tmp_path / "blocks")
    assert build.read_folder(tmp_path / "whole") == build.read_folder(tmp_path / "blocks")


def reordered(directory: Path, case: str) -> dict[str, NDArray[np.float64]]:
    """A checkpoint with activation order: each column has a group of its own choice."""
    meaning = checkpoint(directory, *CASES[case])
    tensors = build.read_folder(directory)
    rng = np.random.default_rng(0)
    for path in meaning:
        groups = np.frombuffer(tensors[f"{path}.g_idx"].data, np.int32)
        order = rng.permutation(groups).astype(np.int32)
        tensors[f"{path}.g_idx"] = build.raw(order)
        codes = unpacked(tensors[f"{path}.qweight"], len(groups), 4)
        zeros = unpacked(tensors[f"{path}.qzeros"], codes.shape[1], 4, across=True) + 1
        scales = build.floats(tensors[f"{path}.scales"])
        meaning[path] = ((codes - zeros[order]) * scales[order]).T
    build.write_safetensors(directory / "model.safetensors", tensors)
    return meaning


def unpacked(tensor: build.Raw, count: int, bits: int, across: bool = False) -> NDArray[np.float64]:
    """Codes `[count, ...]` packed along the rows, or `[..., count]` along the columns."""
    numbers = np.frombuffer(tensor.data, np.uint8).reshape(*tensor.shape, 4)
    lines = (numbers if across else numbers.swapaxes(0, 1)).reshape(-1, numbers.shape[across] * 4)
    places = np.unpackbits(lines, axis=1, bitorder="little")[:, : count * bits]
    found = places.reshape(len(lines), count, bits) @ (1.0 * 2 ** np.arange(bits))
    return found if across else found.T


def test_activation_order_is_named_and_its_values_are_kept(tmp_path: Path) -> None:
    meaning = reordered(tmp_path / "in", "gptq 4 bits, groups of 32, version 1")
    with pytest.raises(RejectedError, match=r"q_proj: columns are reordered.*--dequantize"):
        prepare(tmp_path / "in", Request(), "x")
    request = Request(dequantize=True, dtype="F32")
    convert(prepare(tmp_path / "in", request, "x"), tmp_path / "out")
    found = build.read_folder(tmp_path / "out")
    for path, expected in meaning.items():
        assert np.allclose(build.floats(found[f"{path}.weight"]), expected, rtol=1e-6, atol=0)
    again = prepare(tmp_path / "in", Request(QuantSpec(8, 32), requantize=True), "x")
    assert {step.transform for step in again.plan.steps if step.path in meaning} == {"requantize"}


def test_a_column_of_no_group_is_refused(tmp_path: Path) -> None:
    checkpoint(tmp_path / "in", *CASES["gptq 4 bits, groups of 32, version 1"])
    tensors = build.read_folder(tmp_path / "in")
    name = "model.layers.1.mlp.down_proj.g_idx"
    order = np.frombuffer(tensors[name].data, np.int32).copy()
    for wrong in (-1, 8):
        order[7] = wrong
        tensors[name] = build.raw(order)
        build.write_safetensors(tmp_path / "in" / "model.safetensors", tensors)
        with pytest.raises(RejectedError, match=r"down_proj.g_idx: groups from"):
            prepare(tmp_path / "in", Request(dequantize=True), "x")


def test_a_plain_order_is_kept_although_the_config_says_desc_act(tmp_path: Path) -> None:
    block, *rest = CASES["gptq 4 bits, groups of 32, version 1"]
    checkpoint(tmp_path / "in", block | {"desc_act": True, "static_groups": True}, *rest)
    plan = prepare(tmp_path / "in", Request(), "x").plan
    assert {step.transform for step in plan.steps if step.matrix and "proj" in step.path} == {
        "keep"
    }


@pytest.mark.parametrize("form", ["gptq", "gptq_v2", None])
@pytest.mark.parametrize("version", [1, 2])
def test_symmetric_zeros_show_their_version(tmp_path: Path, form: str | None, version: int) -> None:
    block = {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": True, "desc_act": False}
    if form is not None:
        block["checkpoint_format"] = form
    meaning = checkpoint(
        tmp_path / "in", block, 4, 64, lambda c, z: gptq(c, z, 4, version), symmetric=True
    )
    convert(prepare(tmp_path / "in", Request(), "x"), tmp_path / "out")
    found = build.read_folder(tmp_path / "out")
    for path, expected in meaning.items():
        parts = [found[f"{path}.{part}"] for part in ("weight", "scales", "biases")]
        assert np.allclose(build.dequantize_affine(*parts, 4, 64), expected, rtol=0, atol=1e-7)


def test_single_modules_with_bits_of_their_own(tmp_path: Path) -> None:
    """GPTQModel's `dynamic` and AutoRound's `extra_config`: the tensors show what holds where."""
    values = {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": False, "desc_act": False}
    meaning = checkpoint(tmp_path / "in", values, 4, 64, lambda c, z: gptq(c, z, 4, 1))
    other = checkpoint(tmp_path / "other", values, 8, 32, lambda c, z: gptq(c, z, 8, 1))
    tensors, eights = (build.read_folder(tmp_path / name) for name in ("in", "other"))
    for path in [path for path in meaning if path.endswith("down_proj")]:
        meaning[path] = other[path]
        tensors |= {key: value for key, value in eights.items() if key.startswith(f"{path}.")}
    plain = "model.layers.0.self_attn.q_proj"
    for part in ("qweight", "qzeros", "scales", "g_idx"):
        del tensors[f"{plain}.{part}"]
    tensors[f"{plain}.weight"] = build.raw(meaning[plain], "F16")
    dynamic = {r"+:.*\.down_proj": {"bits": 8, "group_size": 32}, r"-:.*0.*q_proj": {}}
    config = build.config(quantization_config=values | {"dynamic": dynamic})
    build.write_checkpoint(tmp_path / "mixed", config, tensors)
    request = Request(dequantize=True, dtype="F32")
    convert(prepare(tmp_path / "mixed", request, "x"), tmp_path / "out")
    found = build.read_folder(tmp_path / "out")
    for path, expected in meaning.items():
        atol = 2e-3 if path == plain else 1e-7
        assert np.allclose(build.floats(found[f"{path}.weight"]), expected, rtol=1e-6, atol=atol)
    # Without the key nothing may vary.
    build.write_checkpoint(tmp_path / "mixed", build.config(quantization_config=values), tensors)
    with pytest.raises(RejectedError, match="shape"):
        prepare(tmp_path / "mixed", Request(), "x")


def test_auto_round_is_read_as_what_it_packs(tmp_path: Path) -> None:
    block = {"quant_method": "auto-round", "bits": 4, "group_size": 64, "sym": False,
             "data_type": "int", "autoround_version": "0.16.1"}  # fmt: skip
    packings: dict[str, Callable[..., dict[str, NDArray[Any]]]] = {
        "auto_round:auto_gptq": lambda c, z: gptq(c, z, 4, 1),
        "auto_round:gptqmodel": lambda c, z: gptq(c, z, 4, 2),
        "auto_round:auto_awq": awq,
    }
    for index, (packing, pack) in enumerate(packings.items()):
        folder = tmp_path / str(index)
        meaning = checkpoint(folder, block | {"packing_format": packing}, 4, 64, pack)
        convert(prepare(folder, Request(), "x"), tmp_path / f"out{index}")
        found = build.read_folder(tmp_path / f"out{index}")
        path = "model.layers.1.mlp.down_proj"
        parts = [found[f"{path}.{part}"] for part in ("weight", "scales", "biases")]
        values = build.dequantize_affine(*parts, 4, 64)
        assert np.allclose(values, meaning[path], rtol=0, atol=1e-7)
    checkpoint(tmp_path / "no", block | {"packing_format": "auto_round:marlin"}, 4, 64, awq)
    with pytest.raises(RejectedError, match=r"marlin.*is not read; export it with AutoRound as"):
        prepare(tmp_path / "no", Request(), "x")


def test_zero_points_that_version_1_cannot_hold(tmp_path: Path) -> None:
    checkpoint(tmp_path / "in", *CASES["gptq 4 bits, groups of 32, version 1"])
    tensors = build.read_folder(tmp_path / "in")
    name = "model.layers.0.mlp.up_proj.qzeros"
    zeros = np.frombuffer(tensors[name].data, np.int32).reshape(tensors[name].shape).copy()
    zeros[0, 0] |= 15
    tensors[name] = build.raw(zeros)
    build.write_safetensors(tmp_path / "in" / "model.safetensors", tensors)
    with pytest.raises(RejectedError, match="gptq_v2"):
        prepare(tmp_path / "in", Request(), "x")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 5}, "bits"),
        ({"bits": "4"}, "bits"),
        ({"bits": True}, "bits"),
        ({"group_size": 0}, "group_size"),
        ({"group_size": 64}, "shape"),
        ({"checkpoint_format": "marlin"}, "marlin"),
        ({"sym": True}, "half the range"),
    ],
)
def test_contradictions_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    block, *rest = CASES["gptq 4 bits, groups of 32, version 2"]
    checkpoint(tmp_path / "in", block | change, *rest)
    with pytest.raises(RejectedError, match=message):
        prepare(tmp_path / "in", Request(), "x")
