"""Grids are found exactly where they are, and nowhere else."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from numpy.typing import NDArray

from apertus_mlx.convert.job import convert, prepare
from apertus_mlx.convert.plan import grids
from apertus_mlx.convert.plan.policy import Request
from apertus_mlx.quant.grid import KINDS, SIGNIFICANT_BITS, recover, round_to
from apertus_mlx.quant.spec import QuantSpec
from tests import convert_builders as build
from tests.daily import every

TYPES = {"BF16": mx.bfloat16, "F16": mx.float16}
FORMATS = [(bits, group) for bits in (2, 3, 4, 5, 6) for group in (32, 64, 128)]


def gaussian(dtype: str, seed: int = 0) -> mx.array:
    rng = np.random.default_rng(seed)
    return mx.array((rng.standard_normal((96, 512)) * 0.02).astype(np.float32)).astype(TYPES[dtype])


def groups(values: mx.array, size: int) -> NDArray[np.float64]:
    return np.array(values.astype(mx.float32)).astype(np.float64).reshape(-1, size)


def test_rounding_to_significant_bits_is_that_of_the_types() -> None:
    rng = np.random.default_rng(0)
    numbers = rng.standard_normal(20_000) * 10.0 ** rng.integers(-3, 3, 20_000)
    single = numbers.astype(np.float32)
    for dtype, kind in TYPES.items():
        expected = np.array(mx.array(single).astype(kind).astype(mx.float32))
        assert np.array_equal(round_to(single.astype(float), SIGNIFICANT_BITS[dtype]), expected)
    assert np.array_equal(round_to(numbers, 24), single.astype(float))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("bits", "group"), FORMATS)
def test_what_mlx_dequantized_comes_back_element_for_element(
    bits: int, group: int, dtype: str
) -> None:
    packed = mx.quantize(gaussian(dtype), group_size=group, bits=bits)
    values = mx.dequantize(*packed, group_size=group, bits=bits)
    found = recover(groups(values, group), bits, dtype, "mlx")
    assert found.found.all()
    scales = mx.array(found.scales.astype(np.float32)).astype(TYPES[dtype])
    biases = mx.array(found.biases.astype(np.float32)).astype(TYPES[dtype])
    codes = mx.array(found.codes).astype(TYPES[dtype])
    # MLX's own arithmetic: a product and a sum, each rounded to 16 bits.
    again = (scales[:, None] * codes) + biases[:, None]
    assert mx.array_equal(again, values.reshape(-1, group))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", every(2, ["BF16", "F16", "F32"]))
@pytest.mark.parametrize(("bits", "group"), FORMATS)
@pytest.mark.parametrize("scale_bits", [8, 24])
def test_scaled_integers_come_back(
    bits: int, group: int, dtype: str, symmetric: bool, scale_bits: int
) -> None:
    if dtype == "F32" and scale_bits == 24:
        scale_bits = 24 - bits  # beyond that the zero point times the scale has no float32
    rng = np.random.default_rng(bits * group)
    count, significant = 150, SIGNIFICANT_BITS[dtype]
    scale = round_to(rng.uniform(0.001, 0.01, count), scale_bits)
    zero = np.full(count, 1 << (bits - 1)) if symmetric else rng.integers(0, 1 << bits, count)
    spread = rng.standard_normal((count, group)) * (1 << bits) / 5
    steps = np.clip(np.rint(spread), -zero[:, None], (1 << bits) - 1 - zero[:, None])
    values = round_to(scale[:, None] * steps, significant)
    # A stored zero point or a longer scale needs float32, as the plan says.
    found = recover(values, bits, dtype, "exact32")
    assert found.found.all()
    exact = found.scales[:, None] * found.codes + found.biases[:, None]
    assert np.array_equal(round_to(exact, significant), values)
    assert np.array_equal(found.scales, found.scales.astype(np.float32))
    assert np.array_equal(found.biases, found.biases.astype(np.float32))
    if symmetric and scale_bits == 8:
        short = recover(values, bits, dtype, "exact")
        assert short.found.all()
        assert np.array_equal(round_to(short.biases, significant), short.biases)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("bits", every(2, [2, 3, 4, 5, 6, 8]))
@pytest.mark.parametrize("group", every(2, [32, 64, 128]))
def test_random_weights_are_on_no_grid(bits: int, group: int, dtype: str) -> None:
    for seed in range(1):
        values = groups(gaussian(dtype, seed)[:24], group)
        for kind in KINDS:
            assert not recover(values, bits, dtype, kind).found.any()


def test_one_value_off_the_grid_is_noticed() -> None:
    packed = mx.quantize(gaussian("BF16"), group_size=64, bits=4)
    values = groups(mx.dequantize(*packed, group_size=64, bits=4), 64)
    values[7, 3] = round_to(values[7, 3] * 1.02, 8)
    found = recover(values, 4, "BF16", "mlx").found
    assert not found[7]
    assert found.sum() == len(values) - 1


def test_groups_of_one_value() -> None:
    values = np.zeros((3, 32))
    values[1] = 0.5
    values[2] = -3
    found = recover(values, 4, "BF16", "exact")
    assert found.found.all()
    assert np.array_equal(found.scales[:, None] * found.codes + found.biases[:, None], values)


def quantized_checkpoint(directory: Path, kind: str) -> Path:
    """A checkpoint whose matrices were dequantized from 4 bits and saved in bfloat16."""
    values = build.config()
    tensors = build.random_tensors(values)
    for index, (name, tensor) in enumerate(tensors.items()):
        if len(tensor.shape) < 2:
            continue
        if kind == "mlx":
            packed = mx.quantize(build.as_mlx(tensor), group_size=64, bits=4)
            array = np.array(mx.dequantize(*packed, group_size=64, bits=4).astype(mx.float32))
        else:
            rng = np.random.default_rng(index)
            scale = rng.uniform(0.01, 0.02, (tensor.shape[0], 1))
            scale = round_to(scale, 8 if kind == "rows" else 24)
            array = scale * np.clip(np.rint(rng.standard_normal(tensor.shape) * 3), -8, 7)
        tensors[name] = build.raw(array.astype(np.float32), "BF16")
    return build.write_checkpoint(directory, values, tensors)


@pytest.mark.parametrize("kind", ["mlx", "rows", "long"])
def test_conversion_keeps_the_grid_and_says_so(tmp_path: Path, kind: str) -> None:
    source = quantized_checkpoint(tmp_path / "in", kind)
    job = prepare(source, Request(QuantSpec(4, 64)), "x")
    assert any("14 matrices already lie on a grid" in note for note in job.plan.notes)
    convert(job, tmp_path / "out")
    before, after = build.read_folder(source), build.read_folder(tmp_path / "out")
    for name, tensor in before.items():
        if len(tensor.shape) < 2:
            continue
        parts = [after[name.replace("weight", part)] for part in ("weight", "scales", "biases")]
        assert parts[1].dtype == ("F32" if kind == "long" else "BF16")
        if kind == "mlx":
            packed = [build.as_mlx(part) for part in parts]
            again = mx.dequantize(*packed, group_size=64, bits=4)
            assert mx.array_equal(again, build.as_mlx(tensor))
        else:
            exact = build.dequantize_affine(*parts, 4, 64)
            rounded = build.floats(build.raw(exact.astype(np.float32), "BF16"))
            assert np.array_equal(rounded, build.floats(tensor))


def test_another_format_or_type_is_quantized_as_usual(tmp_path: Path) -> None:
    source = quantized_checkpoint(tmp_path / "in", "long")
    for request in (
        Request(QuantSpec(3, 64)),
        Request(QuantSpec(4, 32, "mxfp4")),
        Request(QuantSpec(4, 64), dtype="BF16"),
    ):
        transforms = {step.transform for step in prepare(source, request, "x").plan.steps}
        assert "grid" not in transforms


@pytest.mark.parametrize("together", [1, 1 << 18])
def test_each_matrix_is_probed_for_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, together: int
) -> None:
    """Also among others, of other widths and on other grids, with which it is looked at."""
    monkeypatch.setattr(grids, "PROBE_VALUES", together)
    values = build.config()
    tensors = build.random_tensors(values)
    wanted: dict[str, str] = {}
    for index, (name, tensor) in enumerate(tensors.items()):
        if len(tensor.shape) == 2 and index % 4:
            packed = mx.quantize(build.as_mlx(tensor), group_size=64, bits=6)
            array = np.array(mx.dequantize(*packed, group_size=64, bits=6).astype(mx.float32))
            if index % 4 == 3:
                # Beyond the rows that are probed first.
                array[-1, 0] *= 1.5
            else:
                wanted[name.removesuffix(".weight")] = "mlx"
            tensors[name] = build.raw(array, "BF16")
    source = build.write_checkpoint(tmp_path / "in", values, tensors)
    plan = prepare(source, Request(QuantSpec(6, 64)), "x").plan
    assert {step.path: step.grid for step in plan.steps if step.grid} == wanted
    assert 3 < len(wanted) < 11
