"""compressed-tensors: its presets for weights, compressed and decompressed by the library."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.neighbours.corpus import Case, Values
from benchmarks.neighbours.with_transformers import load, save_tokenizer, values_of

TOOL, PACKAGE = "compressed-tensors", "compressed-tensors"
PRESETS = (
    "W4A16", "W4A16_ASYM", "W2A16", "W3A16", "W5A16", "W6A16", "W7A16", "W8A16", "W8A8", "W4A8",
    "W4AFP8", "FP8", "FP8_DYNAMIC", "FP8_BLOCK", "NVFP4A16", "NVFP4", "MXFP4A16", "MXFP4",
    "MXFP6A16", "MXFP8A16", "MXFP8",
)  # fmt: skip


def cases() -> list[Case]:
    """Every preset; then group sizes, orders and strategies that have none."""
    found = [Case(name, partial(compressed, preset=name), "bfloat16") for name in PRESETS]
    integers: dict[str, dict[str, Any]] = {
        "int4, groups of 32": {"num_bits": 4, "strategy": "group", "group_size": 32},
        "int4 per row, asymmetric": {"num_bits": 4, "strategy": "channel", "symmetric": False},
        "int8 per matrix": {"num_bits": 8, "strategy": "tensor"},
        "int4 with actorder=weight": {
            "num_bits": 4, "strategy": "group", "group_size": 64, "actorder": "weight"
        },
        "fp8 in groups of 64": {
            "num_bits": 8, "type": "float", "strategy": "group", "group_size": 64
        },
    }  # fmt: skip
    return found + [
        Case(name, partial(compressed, weights=weights), "bfloat16")
        for name, weights in integers.items()
    ]


def compressed(
    base: Path, folder: Path, preset: str | None = None, weights: dict[str, Any] | None = None
) -> Values:
    import torch
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        QuantizationStatus,
        apply_quantization_config,
        preset_name_to_scheme,
    )

    model = load(base)
    scheme = (
        preset_name_to_scheme(preset, ["Linear"])
        if preset
        else QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**(weights or {})))
    )
    config = QuantizationConfig(
        config_groups={"group_0": scheme},
        ignore=["lm_head"],
        quantization_status=QuantizationStatus.FROZEN,
    )
    apply_quantization_config(model, config)
    with torch.no_grad():
        for module in model.modules():
            if getattr(module, "quantization_scheme", None) is not None:
                _calibrate(module, scheme.weights)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(str(folder))
    save_tokenizer(base, folder)
    compressor.decompress_model(model)
    return values_of(model)


def _calibrate(module: Any, arguments: Any) -> None:
    """Scales and zero points from the extremes of what they hold for."""
    import torch
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    weight = module.weight.float()
    rows, columns = weight.shape
    strategy = str(getattr(arguments.strategy, "value", arguments.strategy))
    size = arguments.group_size or columns
    if strategy in ("group", "tensor_group"):
        parts = weight.reshape(rows, -1, size)
        low, high = parts.amin(-1), parts.amax(-1)
    elif strategy == "channel":
        low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    elif strategy == "block":
        height, width = arguments.block_structure
        tiles = [row.split(width, 1) for row in weight.split(height, 0)]
        low, high = (
            torch.stack([torch.stack([kind(tile) for tile in row]) for row in tiles])
            for kind in (torch.amin, torch.amax)
        )
    else:
        low, high = weight.amin().reshape(1), weight.amax().reshape(1)
    whole = None
    if strategy == "tensor_group":
        whole = generate_gparam(weight.amin(), weight.amax())
        module.weight_global_scale.copy_(whole)
    scale, zero = calculate_qparams(low, high, arguments, global_scale=whole)
    module.weight_scale.copy_(scale.reshape(module.weight_scale.shape))
    if getattr(module, "weight_zero_point", None) is not None:
        module.weight_zero_point.copy_(zero.reshape(module.weight_zero_point.shape))
    for name in ("input_scale", "input_global_scale", "output_scale"):
        if getattr(module, name, None) is not None:
            getattr(module, name).fill_(1)
