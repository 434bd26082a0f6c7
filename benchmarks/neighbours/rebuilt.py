"""Files of tools that do not run everywhere, rebuilt from their documentation.

AutoGPTQ and AutoAWQ are no longer kept up and do not know Apertus; Unsloth wants a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.neighbours.corpus import Case, Values, base_values
from tests import convert_builders as build

TOOL, PACKAGE = "rebuilt", None
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
UNSLOTH = {
    "unsloth_version": "2026.8.1", "unsloth_fixed": True, "pad_token_id": 3, "dtype": "bfloat16",
    "torch_dtype": "bfloat16",
}  # fmt: skip
BITSANDBYTES = {
    "quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False,
    "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16",
    "bnb_4bit_use_double_quant": True, "llm_int8_skip_modules": None,
}  # fmt: skip
GPTQ = {
    "quant_method": "gptq", "bits": 4, "group_size": 128, "damp_percent": 0.01, "sym": True,
    "static_groups": False, "true_sequential": True, "model_name_or_path": None,
    "model_file_base_name": "model", "is_marlin_format": False,
}  # fmt: skip
AWQ = {
    "quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm",
    "modules_to_not_convert": None,
}  # fmt: skip


@dataclass(frozen=True)
class Rounded:
    """A matrix in 4 bits: `codes [in, out]`, `zeros` and `scales` `[groups, out]` in float16.

    `order [in]` is the group of each input, and `exact [in, out]` what all of it means.
    """

    codes: NDArray[np.uint32]
    zeros: NDArray[np.int64]
    scales: NDArray[np.float16]
    order: NDArray[np.int64]

    @property
    def exact(self) -> NDArray[np.float64]:
        steps = self.codes.astype(np.float64) - self.zeros[self.order]
        return steps * self.scales[self.order].astype(np.float64)


# Makes the tensors of one matrix, and its values `[in, out]` as they are unpacked.
Pack = Callable[[Rounded], tuple[dict[str, Any], NDArray[Any]]]


def cases() -> list[Case]:
    """Unsloth's merges, AutoGPTQ with and without its order, AutoAWQ."""
    return [
        Case("Unsloth, merged in 16 bits", partial(plain, changes=UNSLOTH)),
        Case(
            "Unsloth, merged in 16 bits, bitsandbytes block left",
            partial(plain, changes=UNSLOTH | {"quantization_config": BITSANDBYTES}),
        ),
        Case("Unsloth, bitsandbytes 4 bits", bitsandbytes),
        Case("AutoGPTQ 0.7, 4 bits", partial(integers, block=GPTQ | {"desc_act": False})),
        Case("AutoGPTQ 0.7, 4 bits, desc_act", partial(integers, block=GPTQ | {"desc_act": True})),
        Case("AutoAWQ 0.2, 4 bits", partial(integers, block=AWQ)),
    ]


def plain(base: Path, folder: Path, changes: dict[str, Any]) -> Values:
    build.write_checkpoint(folder, build.config(**changes), build.read_folder(base))
    return base_values(base)


def bitsandbytes(base: Path, folder: Path) -> Values:
    """Only the shapes are right: nothing reads the values."""
    tensors = build.read_folder(base)
    for name, tensor in list(tensors.items()):
        if "_proj" in name:
            count = tensor.shape[0] * tensor.shape[1]
            tensors[name] = build.raw(np.zeros((count // 2, 1), np.uint8))
            tensors[f"{name}.absmax"] = build.raw(np.ones(count // 64, np.uint8))
            tensors[f"{name}.quant_map"] = build.raw(np.ones(16, np.float32))
    build.write_checkpoint(folder, build.config(quantization_config=BITSANDBYTES), tensors)
    return {}


def integers(base: Path, folder: Path, block: dict[str, Any], pack: Pack | None = None) -> Values:
    """Weights rounded to 4 bits per 128 inputs, packed as GPTQ or AWQ pack them, or by `pack`."""
    tensors, values = build.read_folder(base), base_values(base)
    pack = pack or (_awq if block["quant_method"] == "awq" else _gptq)
    rng = np.random.default_rng(0)
    for path in [path for path in values if path.endswith("_proj")]:
        packed, unpacked = pack(rounded(values[path].T, block, rng))
        del tensors[f"{path}.weight"]
        tensors |= {f"{path}.{key}": build.raw(array) for key, array in packed.items()}
        values[path] = unpacked.T.astype(np.float32)
    build.write_checkpoint(folder, build.config(quantization_config=block), tensors)
    return values


def rounded(
    weight: NDArray[np.float32], block: dict[str, Any], rng: np.random.Generator
) -> Rounded:
    """`weight [in, out]` to the nearest of 16 steps per group."""
    inputs, size = len(weight), block["group_size"]
    order = np.arange(inputs) // size
    if block.get("desc_act"):
        order = rng.permutation(order)
    groups = [weight[order == group] for group in range(inputs // size)]
    low = np.array([np.minimum(part.min(0), 0) for part in groups])
    high = np.array([np.maximum(part.max(0), 0) for part in groups])
    if block.get("sym"):
        high = np.maximum(-low, high)
        low = -high
    scales = ((high - low) / 15).astype(np.float16)
    zeros = np.full(scales.shape, 8)
    if not block.get("sym"):
        zeros = np.clip(np.round(-low / scales), 1, 15).astype(int)
    steps = np.round(weight / scales[order]) + zeros[order]
    return Rounded(np.clip(steps, 0, 15).astype(np.uint32), zeros, scales, order)


def _nibbles(codes: NDArray[Any]) -> NDArray[np.int32]:
    """Eight codes of the last axis per word, from the lowest bits on."""
    eights = codes.astype(np.uint32).reshape(*codes.shape[:-1], -1, 8)
    words = (eights << (4 * np.arange(8, dtype=np.uint32))).sum(-1, dtype=np.uint32)
    return np.ascontiguousarray(words).view(np.int32)


def _gptq(given: Rounded) -> tuple[dict[str, Any], NDArray[Any]]:
    weight = np.ascontiguousarray(_nibbles(given.codes.T).T)
    order = given.order.astype(np.int32)
    tensors = {"qweight": weight, "qzeros": _nibbles(given.zeros - 1), "g_idx": order}
    return tensors | {"scales": given.scales}, given.exact


def _awq(given: Rounded) -> tuple[dict[str, Any], NDArray[Any]]:
    def interleaved(matrix: NDArray[Any]) -> NDArray[np.int32]:
        eights = matrix.reshape(len(matrix), -1, 8)[:, :, AWQ_ORDER]
        return _nibbles(eights.reshape(len(matrix), -1))

    tensors = {"qweight": interleaved(given.codes), "qzeros": interleaved(given.zeros)}
    return tensors | {"scales": given.scales}, given.exact
