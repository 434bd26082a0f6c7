"""Every quantized form that MLX knows loads, and equals the float model of its own weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from apertus_mlx.backend.mlx import load_model
from apertus_mlx.checkpoint import layout
from apertus_mlx.checkpoint.config import parse_config
from apertus_mlx.checkpoint.inventory import take_inventory
from apertus_mlx.errors import RejectedError
from apertus_mlx.quant.spec import AFFINE_BITS, AFFINE_GROUP_SIZES, FLOAT_MODES, QuantSpec
from tests.builders import config_4x, random_weights, write_checkpoint
from tests.daily import every

pytestmark = pytest.mark.gpu

IDS = mx.array([[1, 65, 74, 150, 233, 80, 201, 99]])
SPECS = [QuantSpec(bits, size) for bits in AFFINE_BITS for size in AFFINE_GROUP_SIZES]
SPECS += [QuantSpec(bits, size, mode) for mode, (bits, size) in FLOAT_MODES.items()]  # type: ignore[arg-type]


def base_config(tied: bool = False, **changes: Any) -> dict[str, Any]:
    # Every matrix has columns that divide into groups of 128.
    size = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4}
    return config_4x(**size, num_hidden_layers=1, tie_word_embeddings=tied, **changes)


def block(spec: QuantSpec) -> dict[str, Any]:
    extra = {} if spec.mode == "affine" else {"mode": spec.mode}
    return {"group_size": spec.group_size, "bits": spec.bits, **extra}


def quantize_into(
    weights: dict[str, Any], path: str, spec: QuantSpec, scale_dtype: mx.Dtype = mx.float32
) -> np.ndarray:
    """Replace a matrix by its quantized form; return what that form stands for, in float64."""
    weight = mx.array(weights.pop(f"{path}.weight")).astype(scale_dtype)
    codes, scales, *biases = mx.quantize(weight, spec.group_size, spec.bits, mode=spec.mode)
    weights[f"{path}.weight"], weights[f"{path}.scales"] = codes, scales
    if biases:
        weights[f"{path}.biases"] = biases[0]
        return unpack(codes, scales, biases[0], spec)
    return unpack_float(codes, scales, spec)


def minifloat(exponent_bits: int, mantissa_bits: int) -> np.ndarray:
    """The value of every code of a signed float without infinities (OCP OFP8 and MX formats)."""
    bias = 2 ** (exponent_bits - 1) - 1
    magnitudes = []
    for code in range(2 ** (exponent_bits + mantissa_bits)):
        exponent, mantissa = divmod(code, 2**mantissa_bits)
        fraction = mantissa / 2**mantissa_bits + (exponent > 0)
        magnitudes.append(fraction * 2.0 ** (max(exponent, 1) - bias))
    return np.array(magnitudes + [-value for value in magnitudes])


def unpack_float(codes: mx.array, scales: mx.array, spec: QuantSpec) -> np.ndarray:
    """Shared scale times element, from the specifications, without MLX."""
    data = np.array(codes).view(np.uint8)
    if spec.bits == 4:
        elements = minifloat(2, 1)[np.stack([data & 15, data >> 4], -1)]
    else:
        elements = minifloat(4, 3)[data]
    grouped = elements.reshape(codes.shape[0], -1, spec.group_size)
    raw = np.array(scales)
    scale = minifloat(4, 3)[raw] if spec.mode == "nvfp4" else 2.0 ** (raw.astype(int) - 127)
    return (grouped * scale[..., None]).reshape(codes.shape[0], -1)


def unpack(codes: mx.array, scales: mx.array, biases: mx.array, spec: QuantSpec) -> np.ndarray:
    """`scale * code + bias` from the bit stream, without MLX."""
    rows = codes.shape[0]
    stream = np.unpackbits(np.array(codes).view(np.uint8), axis=1, bitorder="little")
    bits = stream.reshape(rows, -1, spec.bits)
    values = (bits * (1 << np.arange(spec.bits))).sum(-1).astype(np.float64)
    grouped = values.reshape(rows, -1, spec.group_size)
    scale, bias = (np.array(a.astype(mx.float32), np.float64)[..., None] for a in (scales, biases))
    return (grouped * scale + bias).reshape(rows, -1)


def compare(tmp_path: Path, config: dict[str, Any], specs: dict[str, Any]) -> None:
    quantized: dict[str, Any] = dict(random_weights(config))
    plain = dict(quantized)
    for path, (spec, dtype) in specs.items():
        plain[f"{path}.weight"] = quantize_into(quantized, path, spec, dtype).astype(np.float32)
    default = next(iter(specs.values()))[0]
    overrides = {path: block(spec) for path, (spec, _) in specs.items() if spec != default}
    with_block = {**config, "quantization": {**block(default), **overrides}}
    # mx.save_safetensors is called by name, so that scales keep their own types.
    folder = write_checkpoint(tmp_path / "q", with_block, {}, tokenizer=False)
    arrays = {name: mx.array(value) for name, value in quantized.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), arrays, {"format": "mlx"})
    whole = write_checkpoint(tmp_path / "f", config, plain)
    ours, truth = (np.array(load_model(each, "float32")(IDS)) for each in (folder, whole))
    assert np.abs(ours - truth).max() <= 2e-5 * truth.std()


def all_matrices(config: dict[str, Any]) -> list[str]:
    return [matrix.path for matrix in layout.matrices(parse_config(config))]


@pytest.mark.parametrize(
    "spec", every(2, SPECS), ids=lambda spec: f"{spec.mode}-{spec.bits}-{spec.group_size}"
)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_every_format(spec: QuantSpec, tied: bool, tmp_path: Path) -> None:
    config = base_config(tied)
    compare(tmp_path, config, dict.fromkeys(all_matrices(config), (spec, mx.float32)))


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16], ids=["bf16", "fp16"])
def test_scales_in_16_bits(dtype: mx.Dtype, tmp_path: Path) -> None:
    config = base_config()
    compare(tmp_path, config, dict.fromkeys(all_matrices(config), (QuantSpec(4, 64), dtype)))


def test_formats_per_module(tmp_path: Path) -> None:
    config = base_config()
    mixed = {path: (QuantSpec(3, 64), mx.float32) for path in all_matrices(config)}
    mixed["model.embed_tokens"] = (QuantSpec(6, 32), mx.bfloat16)
    mixed["lm_head"] = (QuantSpec(8, 32, "mxfp8"), mx.float32)
    del mixed["model.layers.0.self_attn.k_proj"]
    compare(tmp_path, config, mixed)


def refused(tmp_path: Path, weights: dict[str, Any], quantization: object, named: str) -> None:
    config = base_config(quantization=quantization)
    folder = write_checkpoint(tmp_path, config, {}, tokenizer=False)
    arrays = {name: mx.array(value) for name, value in weights.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), arrays)
    with pytest.raises(RejectedError, match=named):
        take_inventory(folder)


def test_config_and_tensors_must_agree(tmp_path: Path) -> None:
    weights: dict[str, Any] = dict(random_weights(base_config()))
    refused(tmp_path, weights, {"group_size": 64, "bits": 4}, "no tensor is")
    up = "model.layers.0.mlp.up_proj"
    quantize_into(weights, up, QuantSpec(4, 64))
    refused(tmp_path, weights, None, "does not say so")
    refused(tmp_path, weights, {"group_size": 64, "bits": 4, up: False}, "does not say so")
    refused(tmp_path, weights, {"group_size": 64, "bits": 8}, f"{up}.weight: shape")
    refused(tmp_path, weights, {"group_size": 32, "bits": 4}, f"{up}.scales: shape")
    without_biases = {name: value for name, value in weights.items() if not name.endswith("biases")}
    refused(tmp_path, without_biases, {"group_size": 64, "bits": 4}, f"{up}.biases: missing")
    without_scales = {name: value for name, value in weights.items() if not name.endswith("scales")}
    refused(tmp_path, without_scales, {"group_size": 64, "bits": 4}, f"{up}.scales")
