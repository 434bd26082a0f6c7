"""AutoAWQ, which is no longer kept up: what its own command does, and its packing by itself."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.neighbours.corpus import Case, Values
from benchmarks.neighbours.rebuilt import AWQ, Rounded, integers

TOOL, PACKAGE = "AutoAWQ", "autoawq"


def cases() -> list[Case]:
    """Its defaults."""
    return [
        Case("quantize", quantized),
        Case("WQLinear_GEMM.from_linear", partial(integers, block=AWQ, pack=packed), "float16"),
    ]


def quantized(base: Path, folder: Path) -> Values:
    from awq import AutoAWQForCausalLM
    from transformers import AutoTokenizer

    model = AutoAWQForCausalLM.from_pretrained(str(base))
    config = {"zero_point": True, "q_group_size": 128, "w_bit": 4, "version": "GEMM"}
    model.quantize(AutoTokenizer.from_pretrained(base), quant_config=config)
    model.save_quantized(str(folder))
    return {}


def packed(given: Rounded) -> tuple[dict[str, Any], np.ndarray]:
    """The library's tensors of one matrix, and what its `dequantize_gemm` makes of them."""
    import torch
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.utils.packing_utils import dequantize_gemm

    linear = torch.nn.Linear(*given.codes.shape, bias=False)
    linear.weight.data = torch.from_numpy(given.exact.T.astype(np.float32))
    module = WQLinear_GEMM.from_linear(
        linear, 4, AWQ["group_size"],
        scales=torch.from_numpy(given.scales.astype(np.float32)),
        zeros=torch.from_numpy(given.zeros),
    )  # fmt: skip
    values = dequantize_gemm(module.qweight, module.qzeros, module.scales, 4, AWQ["group_size"])
    tensors = {name: each.numpy() for name, each in module.state_dict().items()}
    return tensors, values.float().numpy()
