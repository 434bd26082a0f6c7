"""Writes transformers_golden.safetensors: what transformers computes for the parity cases.

Run from the repository's root, with the `parity` extra installed:
    python tests/data/make_transformers_golden.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import save_file

from tests.builders import random_weights
from tests.parity_cases import CASES, GREEDY_TOKENS, PROMPT
from tests.transformers_reference import logits_and_greedy

if __name__ == "__main__":
    arrays = {}
    for name, (config, _) in CASES.items():
        logits, greedy = logits_and_greedy(config, random_weights(config), PROMPT, GREEDY_TOKENS)
        # The last positions depend on all others; more would only make the file larger.
        arrays[f"{name}.logits"] = logits[-3:].copy()
        arrays[f"{name}.greedy"] = np.array(greedy, np.int32)
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    save_file(arrays, Path(__file__).with_name("transformers_golden.safetensors"), versions)
