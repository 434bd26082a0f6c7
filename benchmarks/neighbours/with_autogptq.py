"""AutoGPTQ, which is no longer kept up: what its own command does, and its packing by itself."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.neighbours.corpus import Case, Values
from benchmarks.neighbours.rebuilt import GPTQ, Rounded, integers

TOOL, PACKAGE = "AutoGPTQ", "auto-gptq"


def cases() -> list[Case]:
    """Its defaults, with and without activation order."""
    return [
        Case("quantize", quantized),
        *(
            Case(
                f"{kind}.QuantLinear.pack{', desc_act' if desc_act else ''}",
                partial(
                    integers, block=GPTQ | {"desc_act": desc_act}, pack=partial(packed, kind=kind)
                ),
                "float16",
            )
            for kind, desc_act in (("qlinear_cuda_old", False), ("qlinear_cuda", True))
        ),
    ]


def quantized(base: Path, folder: Path) -> Values:
    from auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig
    from transformers import AutoTokenizer

    model = AutoGPTQForCausalLM.from_pretrained(str(base), BaseQuantizeConfig())
    text = AutoTokenizer.from_pretrained(base)("Paris is the capital of France. " * 8)
    model.quantize([text])
    model.save_quantized(str(folder))
    return {}


def packed(given: Rounded, kind: str) -> tuple[dict[str, Any], np.ndarray]:
    """The library's tensors of one matrix, and its products with the unit vectors."""
    import importlib

    import torch

    module = importlib.import_module(f"auto_gptq.nn_modules.qlinear.{kind}")
    inputs, outputs = given.codes.shape
    linear = torch.nn.Linear(inputs, outputs, bias=False)
    linear.weight.data = torch.from_numpy(given.exact.T.astype(np.float16))
    matrix = module.QuantLinear(4, GPTQ["group_size"], inputs, outputs, bias=False)
    matrix.pack(
        linear,
        torch.from_numpy(np.ascontiguousarray(given.scales.T)),
        torch.from_numpy(np.ascontiguousarray(given.zeros.T)).half(),
        torch.from_numpy(given.order.astype(np.int32)),
    )
    with torch.no_grad():
        values = matrix(torch.eye(inputs, dtype=torch.float16))
    tensors = {name: each.numpy() for name, each in matrix.state_dict().items()}
    return tensors, values.float().numpy()
