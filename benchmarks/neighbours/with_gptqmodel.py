"""GPTQModel (which carries on AutoGPTQ): both formats of GPTQ, orders, exceptions."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.neighbours.corpus import Case, Values

TOOL, PACKAGE = "GPTQModel", "gptqmodel"
TEXTS = ["Paris is the capital of France. " * 12, "the quick brown fox jumps over the dog " * 8] * 4

AWQ = {"quant_method": "awq", "format": "gemm", "bits": 4, "group_size": 128}


def cases() -> list[Case]:
    """Its defaults, then each option that changes the files."""
    options: dict[str, dict[str, Any]] = {
        "bits=4, group_size=128": {"bits": 4, "group_size": 128},
        # More groups than one in each matrix.
        "bits=4, group_size=32, desc_act": {"bits": 4, "group_size": 32, "desc_act": True},
        "bits=4, group_size=32, format=gptq_v2": {
            "bits": 4, "group_size": 32, "format": "gptq_v2"
        },
        "bits=4, group_size=64, sym=False": {"bits": 4, "group_size": 64, "sym": False},
        "bits=4, dynamic": {
            "bits": 4, "group_size": 64,
            "dynamic": {
                r".*down_proj.*": {"bits": 8, "group_size": 32}, r"-:.*q_proj.*": {}
            },
        },
        "bits=3, group_size=64": {"bits": 3, "group_size": 64},
        "bits=8, group_size=-1": {"bits": 8, "group_size": -1},
        "bits=8, group_size=-1, act_group_aware=False": {
            "bits": 8, "group_size": -1, "act_group_aware": False
        },
        # The last, since a process that dies makes no other form.
        "quant_method=awq, format=gemm": AWQ,
    }  # fmt: skip
    return [
        Case(name, partial(quantized, options=each), "float16") for name, each in options.items()
    ]


def quantized(base: Path, folder: Path, options: dict[str, Any]) -> Values:
    _enough_processors()
    from gptqmodel import GPTQModel, QuantizeConfig

    model = GPTQModel.load(str(base), QuantizeConfig(**options), device="cpu")
    model.quantize(TEXTS, batch_size=1)
    model.save(str(folder))
    return values_of(folder)


def _enough_processors() -> None:
    """Let it think that there are four: it divides them among pools of which each wants two."""
    import os

    os.cpu_count = lambda: 4


def values_of(folder: Path) -> Values:
    """What each module of a folder means, by the library's loader and its `dequantize_weight`."""
    _enough_processors()
    import numpy as np
    import torch
    from gptqmodel import BACKEND, GPTQModel

    loaded = GPTQModel.load(
        str(folder), backend=BACKEND.GPTQ_TORCH, device="cpu", dtype=torch.float16
    )
    found = {}
    for path, module in loaded.model.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            values = module.weight
        elif hasattr(module, "dequantize_weight"):
            values = module.dequantize_weight().T
        else:
            continue
        found[path] = np.array(values.detach().float().numpy())
    return found
