"""Makes the fixtures in `compressed_tensors/` with the compressed-tensors library itself.

    python tests/data/make_compressed_tensors.py

Run once with compressed-tensors 0.20.0 (dense packing) and once with 0.12.2 (packing that aligns
codes to words; writes only the cases whose bits do not divide 32, and one that does). Both with
torch 2.13.0. Each file holds the `mlp.up_proj` of two layers, 16 x 128, as the library compresses
them, and as `golden.*` what the library decompresses them to; the metadata holds the
`quantization_config` and the library's version. The second layer has extremes: a row of zeros,
single outliers, tiny values.
"""

from __future__ import annotations

import json
from pathlib import Path

import compressed_tensors
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from safetensors.torch import save_file

DIRECTORY = Path(__file__).parent / "compressed_tensors"
OLD = tuple(map(int, compressed_tensors.__version__.split(".")[:2])) < (0, 15)
ROWS, COLUMNS = 16, 128


def weights(layer: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = 0.05 * torch.randn(ROWS, COLUMNS, generator=generator)
    if layer == 1:
        values[0] = 0
        values[1, 5] = 40.0
        values[2, 7] = -40.0
        values[3] = values[3].abs()
        values[4] = -values[4].abs()
        values[5] *= 1e-4
    return values.to(torch.bfloat16)


def integer_parameters(
    weight: torch.Tensor, arguments: QuantizationArgs
) -> tuple[torch.Tensor, torch.Tensor]:
    size = arguments.group_size or COLUMNS
    groups = weight.float().reshape(ROWS, -1, size)
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), arguments)
    return scale.to(torch.bfloat16), zero.to(torch.int8)


def compress_integers(weight: torch.Tensor, arguments: QuantizationArgs) -> dict[str, torch.Tensor]:
    scale, zero = integer_parameters(weight, arguments)
    if OLD:
        from compressed_tensors.compressors import PackedQuantizationCompressor

        compressor = PackedQuantizationCompressor()
        found = compressor.compress_weight(
            weight, scale, arguments, None if arguments.symmetric else zero
        )
        codes = quantize(
            weight, scale, None if arguments.symmetric else zero, arguments, dtype=torch.int8
        )
        golden = dequantize(codes, scale, None if arguments.symmetric else zero, arguments)
        return {**found, "weight_scale": scale, "golden": golden}
    return compress("pack-quantized", arguments, weight, scale, zero)


def compress(
    form: str,
    arguments: QuantizationArgs,
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None = None,
    global_scale: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    from compressed_tensors.compressors import BaseCompressor

    compressor = BaseCompressor.get_value_from_registry(form)
    state = {"weight": weight, "weight_scale": scale}
    if zero is not None:
        state["weight_zero_point"] = zero
    if global_scale is not None:
        state["weight_global_scale"] = global_scale
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    found = compressor.compress(dict(state), scheme)
    golden = compressor.decompress(dict(found), scheme)["weight"]
    return {**found, "golden": golden}


def float8(weight: torch.Tensor, arguments: QuantizationArgs) -> dict[str, torch.Tensor]:
    largest = weight.float().abs()
    largest = largest.amax().reshape(1) if arguments.strategy == "tensor" else largest.amax(1, True)
    scale = (largest / 448).clamp(min=1e-6).to(torch.bfloat16)
    return compress("float-quantized", arguments, weight, scale)


def plain_integers(weight: torch.Tensor, arguments: QuantizationArgs) -> dict[str, torch.Tensor]:
    scale, zero = integer_parameters(weight, arguments)
    return compress("int-quantized", arguments, weight, scale, zero)


def nvfp4(weight: torch.Tensor, arguments: QuantizationArgs) -> dict[str, torch.Tensor]:
    values = weight.float()
    global_scale = generate_gparam(values.amin(), values.amax()).reshape(1).float()
    groups = values.reshape(ROWS, -1, 16)
    scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), arguments, global_scale)
    return compress("nvfp4-pack-quantized", arguments, values, scale, None, global_scale)


def write(name: str, form: str, arguments: QuantizationArgs, compressor: object) -> None:
    tensors = {}
    for layer in range(2):
        for key, value in compressor(weights(layer, layer), arguments).items():  # type: ignore[operator]
            prefix = "golden" if key == "golden" else f"model.layers.{layer}.mlp.up_proj.{key}"
            tensors[prefix + (f".{layer}" if key == "golden" else "")] = value.contiguous()
    config = {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": arguments.model_dump(mode="json"),
                        "input_activations": None, "output_activations": None}
        },
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
    }  # fmt: skip
    metadata = {
        "fixture": json.dumps(
            {
                "compressed-tensors": compressed_tensors.__version__,
                "quantization_config": config,
            }
        )
    }
    path = DIRECTORY / f"{name}.safetensors"
    save_file(tensors, path, metadata)
    path.chmod(0o644)


def main() -> None:
    DIRECTORY.mkdir(exist_ok=True)
    for bits in (2, 3, 4, 6, 8):
        if OLD and bits in (2, 8):
            continue
        for symmetric in (True, False):
            for size in (None, 32 if bits < 4 else 64):
                arguments = QuantizationArgs(
                    num_bits=bits,
                    symmetric=symmetric,
                    strategy="group" if size else "channel",
                    group_size=size,
                )
                kind = "symmetric" if symmetric else "asymmetric"
                name = f"int{bits}_{kind}_{size or 'channel'}" + ("_aligned" if OLD else "")
                write(name, "pack-quantized", arguments, compress_integers)
    if OLD:
        return
    for symmetric in (True, False):
        arguments = QuantizationArgs(num_bits=8, strategy="channel", symmetric=symmetric)
        kind = "symmetric" if symmetric else "asymmetric"
        write(f"bytes8_{kind}_channel", "int-quantized", arguments, plain_integers)
    for strategy in ("tensor", "channel"):
        arguments = QuantizationArgs(num_bits=8, type="float", strategy=strategy)
        write(f"float8_{strategy}", "float-quantized", arguments, float8)
    arguments = QuantizationArgs(
        num_bits=4, type="float", strategy="tensor_group", group_size=16,
        scale_dtype=torch.float8_e4m3fn,
    )  # fmt: skip
    write("nvfp4", "nvfp4-pack-quantized", arguments, nvfp4)


if __name__ == "__main__":
    main()
