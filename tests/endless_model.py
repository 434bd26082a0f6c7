"""A model whose answers are known and never end, for what happens while one is computed."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from apertus_mlx.text.roles import Role
from apertus_mlx.text.tokenizer import Tokenizer
from tests.builders import config_4x, random_weights, write_checkpoint

VOCABULARY, WIDTH = 400, 512


def write_endless_model(folder: Path, ring: str, first: str = "") -> Path:
    """Write a model that says `first`, then `ring` for ever, whatever it is asked; its folder.

    No character occurs twice: its layers do nothing, so that the last token alone says the next.
    """
    config = config_4x(
        hidden_size=WIDTH, num_attention_heads=8, num_hidden_layers=1, head_dim=64,
        vocab_size=VOCABULARY, max_position_embeddings=1_000_000,
    )  # fmt: skip
    weights = random_weights(config)
    for name in weights:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weights[name] = np.zeros_like(weights[name])
    weights["model.norm.weight"] = np.ones(WIDTH, np.float32)
    weights["model.embed_tokens.weight"] = np.eye(VOCABULARY, WIDTH, dtype=np.float32)
    write_checkpoint(folder, config, weights)
    tokenizer = Tokenizer.load(folder, vocab_size=VOCABULARY, bos_token_id=1)
    said = [Role.ASSISTANT.start, *tokenizer.encode(first), *tokenizer.encode(ring)]
    assert len(set(said)) == len(said)
    following = [*said[1:], said[-len(tokenizer.encode(ring))]]
    head = np.zeros((VOCABULARY, WIDTH), np.float32)
    head[following, said] = 1
    return write_checkpoint(folder, config, {**weights, "lm_head.weight": head})
