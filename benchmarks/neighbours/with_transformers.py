"""transformers: `save_pretrained` of whichever version is installed."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.neighbours.corpus import Case, Values

TOOL, PACKAGE = "transformers", "transformers"


def cases() -> list[Case]:
    """One file, several, float16, all keys of the config, and a variant beside the model."""
    return [
        Case("save_pretrained", saved),
        Case("save_pretrained(max_shard_size=...)", partial(saved, max_shard_size="200KB")),
        Case("save_pretrained, float16", partial(saved, dtype="float16")),
        Case("save_pretrained, config.to_dict() as config.json", partial(saved, whole=True)),
        Case("save_pretrained(variant='fp16') beside the model", with_variant),
    ]


def load(base: Path, dtype: str = "bfloat16") -> Any:
    import torch
    import transformers
    from transformers import ApertusForCausalLM

    config = transformers.ApertusConfig.from_pretrained(base)
    if int(transformers.__version__.split(".")[0]) > 4:
        # Version 5 fills its own default where an old config has no scaling.
        config.rope_parameters = {"rope_type": "default", "rope_theta": 500000.0}
    return ApertusForCausalLM.from_pretrained(
        base, config=config, torch_dtype=getattr(torch, dtype)
    )


def saved(
    base: Path, folder: Path, dtype: str = "bfloat16", whole: bool = False, **options: Any
) -> Values:
    model = load(base, dtype)
    model.save_pretrained(folder, **options)
    save_tokenizer(base, folder)
    if whole:
        config = model.config.to_dict() | {"architectures": ["ApertusForCausalLM"]}
        (folder / "config.json").write_text(json.dumps(config, default=str))
    return values_of(model)


def with_variant(base: Path, folder: Path) -> Values:
    load(base, "float16").save_pretrained(folder, variant="fp16")
    return saved(base, folder)


def save_tokenizer(base: Path, folder: Path) -> None:
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(base).save_pretrained(folder)


def values_of(model: Any) -> Values:
    """What each module of a loaded model means.

    A module that keeps its weights packed is asked for the products with the unit vectors.
    """
    import torch

    found = {}
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            values = module.weight
        elif path.endswith("_proj"):
            columns = getattr(module, "in_features", None) or module.infeatures
            kind = next(iter(module.buffers())).dtype
            kind = kind if kind.is_floating_point else torch.float16
            unit = torch.eye(columns, dtype=kind)
            with torch.no_grad():
                values = module(unit).T
        else:
            continue
        found[path] = np.array(values.detach().float().numpy())
    return found
