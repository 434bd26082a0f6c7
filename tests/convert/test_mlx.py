"""MLX folders as sources: passed through, dequantized, quantized again; from us and from mlx-lm."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from apertus_mlx.checkpoint.config import read_config
from apertus_mlx.checkpoint.inventory import take_inventory
from apertus_mlx.convert.job import convert, prepare
from apertus_mlx.convert.plan.policy import Request, Rule
from apertus_mlx.errors import RejectedError
from apertus_mlx.quant.spec import FLOAT_MODES, QuantSpec
from tests import convert_builders as build
from tests.daily import every

SPECS = [QuantSpec(bits, 64) for bits in (2, 3, 4, 5, 6, 8)]
SPECS += [QuantSpec(bits, group, mode) for mode, (bits, group) in FLOAT_MODES.items()]  # type: ignore[arg-type]


@pytest.mark.parametrize("spec", every(2, [*SPECS[1:], SPECS[0]]), ids=str)
@pytest.mark.parametrize("tied", every(2, [True, False]))
def test_pass_through_changes_nothing(tmp_path: Path, spec: QuantSpec, tied: bool) -> None:
    source = build.write_checkpoint(tmp_path / "in", build.config(tie_word_embeddings=tied))
    rules = (Rule("model.embed_tokens", QuantSpec(6, 32), "test"), Rule("*.v_proj", None, "test"))
    convert(prepare(source, Request(spec, rules), "x"), tmp_path / "first")
    convert(prepare(tmp_path / "first", Request(), "x"), tmp_path / "second")
    assert build.read_folder(tmp_path / "first") == build.read_folder(tmp_path / "second")
    first, second = (read_config(tmp_path / name) for name in ("first", "second"))
    assert first.quantization is not None
    assert second.quantization is not None
    assert first == second


@pytest.mark.parametrize("spec", every(2, SPECS), ids=str)
def test_dequantized_is_what_mlx_says(tmp_path: Path, spec: QuantSpec) -> None:
    source = build.write_checkpoint(tmp_path / "in")
    convert(prepare(source, Request(spec), "x"), tmp_path / "q")
    convert(prepare(tmp_path / "q", Request(dequantize=True, dtype="F32"), "x"), tmp_path / "plain")
    packed, plain = build.read_folder(tmp_path / "q"), build.read_folder(tmp_path / "plain")
    name = "model.layers.1.mlp.down_proj"
    if spec.mode == "affine":
        parts = [packed[f"{name}.{part}"] for part in ("weight", "scales", "biases")]
        expected = build.dequantize_affine(*parts, spec.bits, spec.group_size)
        assert np.allclose(build.floats(plain[f"{name}.weight"]), expected, rtol=0, atol=1e-7)
    else:
        parts = [packed[f"{name}.{part}"] for part in ("weight", "scales")]
        values = mx.dequantize(
            *map(build.as_mlx, parts), group_size=spec.group_size, bits=spec.bits, mode=spec.mode,
            dtype=mx.float32,
        )  # fmt: skip
        assert mx.array_equal(build.as_mlx(plain[f"{name}.weight"]), values)
    assert read_config(tmp_path / "plain").quantization is None


def test_from_mlx_lm(tmp_path: Path) -> None:
    """Its alphas have no dimension and its config says quantization twice."""
    mlx_lm = pytest.importorskip("mlx_lm")
    source = build.write_checkpoint(tmp_path / "in")
    mlx_lm.convert(str(source), str(tmp_path / "theirs"), quantize=True, q_bits=4, q_group_size=64)
    convert(prepare(source, Request(QuantSpec(4, 64)), "x"), tmp_path / "ours")
    convert(prepare(tmp_path / "theirs", Request(), "x"), tmp_path / "through")
    assert build.read_folder(tmp_path / "through") == build.read_folder(tmp_path / "ours")


@pytest.mark.parametrize("dtype", ["F16", "F32"])
def test_scales_in_other_types(tmp_path: Path, dtype: str) -> None:
    values = build.config(torch_dtype=build.REMOVED)
    source = build.write_checkpoint(tmp_path / "in", values, build.random_tensors(values, dtype))
    convert(prepare(source, Request(QuantSpec(4, 64), dtype=dtype), "x"), tmp_path / "first")
    convert(prepare(tmp_path / "first", Request(), "x"), tmp_path / "second")
    first = build.read_folder(tmp_path / "first")
    assert first["lm_head.scales"].dtype == dtype
    second = build.read_folder(tmp_path / "second")
    for name, tensor in first.items():
        if name.endswith((".weight", ".scales", ".biases")) and len(tensor.shape) == 2:
            assert second[name] == tensor


def test_requantizing_keeps_what_already_has_the_format(tmp_path: Path) -> None:
    source = build.write_checkpoint(tmp_path / "in")
    rules = (Rule("lm_head", QuantSpec(8, 64), "test"),)
    convert(prepare(source, Request(QuantSpec(4, 64), rules), "x"), tmp_path / "q")
    request = Request(QuantSpec(4, 64), requantize=True)
    job = prepare(tmp_path / "q", request, "x")
    transforms = {step.path: step.transform for step in job.plan.steps if step.matrix}
    assert transforms.pop("lm_head") == "requantize"
    assert set(transforms.values()) == {"keep"}
    convert(job, tmp_path / "again")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quantization": {"group_size": 64, "bits": "4"}}, "bits"),
        ({"quantization": {"group_size": 48, "bits": 4}}, "48"),
        ({"quantization": {"group_size": 64, "bits": 3}}, "shape"),
        ({"quantization": {"group_size": 64, "bits": 4, "lm_head": False}}, "lm_head"),
        ({"quantization": {"group_size": 64, "bits": 4, "extra": 1}}, "extra"),
    ],
)
def test_a_config_that_contradicts_the_tensors(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    source = build.write_checkpoint(tmp_path / "in")
    convert(prepare(source, Request(QuantSpec(4, 64)), "x"), tmp_path / "q")
    values = json.loads((tmp_path / "q" / "config.json").read_text())
    build.write_json(tmp_path / "q" / "config.json", values | change)
    with pytest.raises(RejectedError, match=message):
        prepare(tmp_path / "q", Request(), "x")


def test_a_tied_head_that_is_stored_equals_the_embedding_in_all_parts(tmp_path: Path) -> None:
    source = build.write_checkpoint(tmp_path / "in", build.config(tie_word_embeddings=True))
    folder = convert(prepare(source, Request(QuantSpec(4, 64)), "x"), tmp_path / "q")
    (folder / "model.safetensors.index.json").unlink()
    tensors = build.read_folder(folder)
    for part in ("weight", "scales", "biases"):
        tensors[f"lm_head.{part}"] = tensors[f"model.embed_tokens.{part}"]
    build.write_safetensors(folder / "model.safetensors", tensors)
    assert not any(s.path == "lm_head" for s in prepare(folder, Request(), "x").plan.steps)
    assert len(take_inventory(folder).dropped) == 3
    scales = tensors["lm_head.scales"]
    tensors["lm_head.scales"] = build.Raw(scales.dtype, scales.shape, scales.data[::-1])
    build.write_safetensors(folder / "model.safetensors", tensors)
    for request in (Request(), Request(allow_untied_head=True)):
        with pytest.raises(RejectedError, match="lm_head differs from the embedding"):
            prepare(folder, request, "x")
    with pytest.raises(RejectedError, match=r"lm_head\.scales differs from the embedding"):
        take_inventory(folder)


def test_a_config_that_says_quantized_without_scales(tmp_path: Path) -> None:
    values = build.config(quantization={"group_size": 64, "bits": 4})
    source = build.write_checkpoint(tmp_path / "in", values)
    with pytest.raises(RejectedError, match="no tensor is"):
        prepare(source, Request(), "x")


@pytest.fixture(scope="module")
def float_folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in each of MLX's floating-point formats, by its name."""
    place = tmp_path_factory.mktemp("floats")
    source = build.write_checkpoint(place / "in")
    for mode, (bits, group) in FLOAT_MODES.items():
        spec = QuantSpec(bits, group, mode)  # type: ignore[arg-type]
        convert(prepare(source, Request(spec), "x"), place / mode)
    return place


@pytest.mark.parametrize(
    ("mode", "part", "byte"),
    [
        ("mxfp4", "scales", 0xFF),
        ("mxfp8", "scales", 0xFF),
        ("mxfp8", "weight", 0x7F),
        ("mxfp8", "weight", 0xFF),
        ("nvfp4", "scales", 0x7F),
        ("nvfp4", "scales", 0xFF),
    ],
)
@pytest.mark.parametrize(
    "request_",
    [Request(), Request(dequantize=True, dtype="F32"), Request(QuantSpec(4, 64), requantize=True)],
    ids=["kept", "dequantized", "requantized"],
)
def test_nan_in_a_float_format_is_refused(
    float_folders: Path, tmp_path: Path, mode: str, part: str, byte: int, request_: Request
) -> None:
    bits, group = FLOAT_MODES[mode]
    folder = Path(shutil.copytree(float_folders / mode, tmp_path / "q"))
    tensors = build.read_folder(folder)
    name = f"model.layers.1.mlp.down_proj.{part}"
    whole = tensors[name]
    tensors[name] = build.Raw(whole.dtype, whole.shape, bytes([byte]) + whole.data[1:])
    # MLX itself would compute with it.
    parts = [build.as_mlx(tensors[name.replace(part, p)]) for p in ("weight", "scales")]
    values = mx.dequantize(*parts, group_size=group, bits=bits, mode=mode, dtype=mx.float32)
    assert not mx.isfinite(values).all()
    build.write_safetensors(folder / "model.safetensors", tensors)
    with pytest.raises(RejectedError, match=rf"{name}: 1 value is NaN"):
        convert(prepare(folder, request_, "x"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
