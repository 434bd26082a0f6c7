"""How large a witness can be: a ladder of sizes, of which a measured step chooses one."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from apertus_mlx.checkpoint import layout
from apertus_mlx.checkpoint.config import parse_config

# A model that has seen fewer tokens per weight has learnt too little to be hurt by rounding.
LEAST_TOKENS_PER_WEIGHT = 0.5
HEAD_DIM = 64
CONTEXT = 1024


@dataclass(frozen=True, slots=True)
class Size:
    """The widths of a model, all multiples of 128; the head is the embedding, as in the Minis."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    vocab_size: int

    @property
    def config(self) -> dict[str, Any]:
        """`config.json`."""
        heads = max(self.hidden // HEAD_DIM, 1)
        return {
            "architectures": ["ApertusForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "hidden_act": "xielu",
            "hidden_size": self.hidden,
            "initializer_range": 0.02,
            "intermediate_size": self.intermediate,
            "max_position_embeddings": CONTEXT,
            "mlp_bias": False,
            "model_type": "apertus",
            "num_attention_heads": heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": max(heads // 4, 1),
            "pad_token_id": 3,
            "post_norm": False,
            "qk_norm": True,
            "rms_norm_eps": 1e-05,
            "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
            "rope_scaling": None,
            "rope_theta": 500000.0,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "vocab_size": self.vocab_size,
        }

    @property
    def weights(self) -> int:
        """How many weights its matrices have."""
        return sum(m.rows * m.columns for m in layout.matrices(parse_config(self.config)))


# The largest's embedding takes 15.7 MB in bfloat16: no tensor may outgrow a file.
SIZES = (
    Size("27M", 512, 2560, 6, 15_360),
    Size("11M", 384, 1920, 4, 8_192),
    Size("5M", 256, 1280, 4, 6_144),
    Size("3M", 256, 1024, 2, 4_096),
    Size("1M", 128, 640, 4, 4_096),
)


def choose(
    sizes: tuple[Size, ...], seconds: float, measure: Callable[[Size], float]
) -> tuple[Size, float]:
    """The largest size that sees enough tokens in `seconds`, and its tokens per second.

    The smallest is taken whatever it sees. `measure` gives a size's tokens per second.
    """
    for size in sizes:
        speed = measure(size)
        tokens = speed * seconds
        enough = tokens >= LEAST_TOKENS_PER_WEIGHT * size.weights
        print(
            f"{size.name}: {speed:,.0f} tokens/s, {tokens / size.weights:.2f} tokens per weight in "
            f"{seconds / 60:.0f} minutes{'' if enough else ': too few'}",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        if enough or size is sizes[-1]:
            return size, speed
    raise AssertionError("no sizes")


def tokens_per_second(step: Callable[[], None], tokens: int, least_seconds: float = 4.0) -> float:
    """How fast steps of `tokens` go, the first one left out."""
    step()
    began, count = time.perf_counter(), 0
    while (spent := time.perf_counter() - began) < least_seconds or count < 2:
        step()
        count += 1
    return tokens * count / spent
