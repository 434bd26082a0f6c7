"""mlx-lm: every mode, every number of bits, every predicate, and plain weights."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from benchmarks.neighbours.corpus import Case, Values

TOOL, PACKAGE = "mlx-lm", "mlx-lm"
PREDICATES = ("mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6")


def cases() -> list[Case]:
    """The forms of `mlx_lm.convert`, and of what its other commands leave in a folder."""
    found = [
        Case("convert", plain),
        Case("convert --dtype float16", partial(plain, dtype="float16")),
    ]
    for bits in (2, 3, 4, 5, 6, 8):
        for group in (32, 64, 128):
            make = partial(quantized, q_bits=bits, q_group_size=group)
            found.append(Case(f"convert -q --q-bits {bits} --q-group-size {group}", make))
    for mode in ("mxfp4", "nvfp4", "mxfp8"):
        found.append(Case(f"convert -q --q-mode {mode}", partial(quantized, q_mode=mode)))
    for name in PREDICATES:
        make = partial(quantized, quant_predicate=name)
        found.append(Case(f"convert -q --quant-predicate {name}", make))
    found += [
        Case("convert -q, single modules (as dwq and dynamic_quant)", single_modules),
        Case("convert -q, then convert --dequantize", dequantized),
    ]
    return found


def plain(base: Path, folder: Path, dtype: str | None = None) -> Values:
    from mlx_lm import convert

    convert(str(base), str(folder), dtype=dtype)
    return values_of(folder)


def quantized(base: Path, folder: Path, **options: Any) -> Values:
    from mlx_lm import convert

    convert(str(base), str(folder), quantize=True, **options)
    return values_of(folder)


def single_modules(base: Path, folder: Path) -> Values:
    """A format per module, and modules that stay as they are, as those commands choose them."""

    def choose(path: str, _module: object, _config: object = None) -> bool | dict[str, Any]:
        if path.endswith("v_proj"):
            return False
        return {"bits": 8 if path.endswith("down_proj") else 3, "group_size": 32}

    return quantized(base, folder, quant_predicate=choose)


def dequantized(base: Path, folder: Path) -> Values:
    from mlx_lm import convert

    between = folder.with_name("quantized")
    convert(str(base), str(between), quantize=True)
    convert(str(between), str(folder), dequantize=True)
    return values_of(folder)


def values_of(folder: Path) -> Values:
    """What each module of a folder means, by mlx-lm's loader and MLX's `dequantize`."""
    import mlx.nn as nn
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding):
            affine = module.mode == "affine"
            values = mx.dequantize(
                module.weight,
                module.scales.astype(mx.float32) if affine else module.scales,
                module.biases.astype(mx.float32) if affine else None,
                group_size=module.group_size,
                bits=module.bits,
                mode=module.mode,
                dtype=mx.float32,
            )
        elif isinstance(module, nn.Linear | nn.Embedding):
            values = module.weight.astype(mx.float32)
        else:
            continue
        found[path] = np.array(values)
    return found
