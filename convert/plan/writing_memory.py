"""What a model takes that writes text to be tuned on (`calibration.own_text`)."""

from __future__ import annotations

from apertus_mlx.cache.store import capacity_for
from apertus_mlx.checkpoint import layout
from apertus_mlx.checkpoint.config import ModelConfig

# Windows that are written at the same time.
TOGETHER = 64
# Arrays of the shape of a step's logits that drawing from them holds at once.
LOGITS_COPIES = 3


def writing_memory_bytes(config: ModelConfig, length: int) -> int:
    """Estimate of what writing windows of `length` tokens holds.

    All weights in float32, the keys and values of all windows that are written together, those of
    one layer once more while they are added to, and the logits of a step.
    """
    positions = TOGETHER * capacity_for(length)
    layer = 2 * positions * config.num_key_value_heads * config.head_dim
    cache = (config.num_hidden_layers + 1) * layer
    logits = LOGITS_COPIES * TOGETHER * config.output_vocab_size
    return 4 * (layout.parameter_count(config) + cache + logits)
