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

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def words(codes: list[int], bits: int) -> list[int]:
    """Codes one after the other from the lowest bit on, as 32-bit words."""
    number = sum(code << (bits * index) for index, code in enumerate(codes))
    return [number >> (32 * i) & 0xFFFFFFFF for i in range(len(codes) * bits // 32)]


def pack_rows(codes: NDArray[np.int64], bits: int) -> NDArray[np.int32]:
    return np.array([words(row.tolist(), bits) for row in codes], np.uint32).view(np.int32)


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


@pytest.mark.parametrize("case", CASES)
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


@pytest.mark.parametrize("case", CASES)
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
    monkeypatch.setattr(reading, "BLOCK_BYTES", 3000)
    convert(prepare(tmp_path / "in", Request(), "x"), tmp_path / "blocks")
    assert build.read_folder(tmp_path / "whole") == build.read_folder(tmp_path / "blocks")


def test_reordered_columns_are_refused_by_name(tmp_path: Path) -> None:
    checkpoint(tmp_path / "in", *CASES["gptq 4 bits, groups of 32, version 1"])
    tensors = build.read_folder(tmp_path / "in")
    name = "model.layers.1.mlp.down_proj.g_idx"
    order = np.frombuffer(tensors[name].data, np.int32)
    tensors[name] = build.raw(np.random.default_rng(0).permutation(order))
    build.write_safetensors(tmp_path / "in" / "model.safetensors", tensors)
    with pytest.raises(RejectedError, match=r"layers.1.mlp.down_proj.g_idx.*act-order"):
        prepare(tmp_path / "in", Request(), "x")


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
