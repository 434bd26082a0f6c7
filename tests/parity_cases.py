"""The random small models that are compared with other implementations of Apertus."""

from __future__ import annotations

from typing import Any

from tests.builders import LLAMA3, config_4x, config_5x

PROMPT = [1, 65, 74, 150, 233, 80, 201, 99, 77, 310, 66, 67]
GREEDY_TOKENS = 64
LINEAR = {"type": "linear", "factor": 2.0}

# name -> (config.json, number of weight files)
CASES: dict[str, tuple[dict[str, Any], int]] = {
    "untied_default": (config_4x(), 1),
    "tied_default": (config_4x(tie_word_embeddings=True), 2),
    "untied_llama3": (config_4x(rope_scaling=LLAMA3, rope_theta=12000000), 1),
    "tied_llama3_5x": (config_5x(rope_scaling=LLAMA3, tie_word_embeddings=True), 3),
    "untied_linear": (config_4x(rope_scaling=LINEAR), 1),
    "tied_linear_5x": (config_5x(rope_scaling={"rope_type": "linear", "factor": 4},
                                 tie_word_embeddings=True), 1),
    "head_dim_32": (config_4x(head_dim=32), 2),
    "head_dim_8_5x": (config_5x(head_dim=8, num_key_value_heads=1), 1),
    "one_kv_head_deep": (config_4x(num_key_value_heads=1, num_hidden_layers=5), 1),
    "no_grouping_llama3": (config_5x(num_key_value_heads=4, rope_scaling=LLAMA3), 4),
}  # fmt: skip
