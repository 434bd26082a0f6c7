"""What Hugging Face transformers computes for a tiny checkpoint, in float32."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


def logits_and_greedy(
    config: Mapping[str, Any],
    weights: Mapping[str, np.ndarray],
    prompt: list[int],
    new_tokens: int,
) -> tuple[np.ndarray, list[int]]:
    """Logits `[L, vocabulary]` of the prompt, and the greedy continuation."""
    import torch
    from transformers import ApertusConfig, ApertusForCausalLM

    values = {key: value for key, value in config.items() if key != "torch_dtype"}
    # transformers 5 reads a flat config without scaling as llama3: say what is meant.
    if "rope_parameters" not in values:
        scaling = values.pop("rope_scaling") or {"rope_type": "default"}
        scaling = {"rope_type": scaling.get("rope_type") or scaling["type"], **scaling}
        values["rope_parameters"] = {**scaling, "rope_theta": float(values.pop("rope_theta"))}
    model = ApertusForCausalLM(ApertusConfig(**{**values, "dtype": "float32"})).eval()
    state = {name: torch.tensor(weight) for name, weight in weights.items()}
    problems = model.load_state_dict(state, strict=False)
    assert not problems.unexpected_keys
    assert set(problems.missing_keys) <= {"lm_head.weight"}
    ids = list(prompt)
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].numpy()
        for _ in range(new_tokens):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return logits, ids[len(prompt) :]
