"""The names of the weights that rotation and smoothing change.

`--rotate`: where the head is its own, the residual stream is rotated; the weights of norms move
into the matrices after them first, so that the norms commute with it. In every model the values
of attention are rotated within each head. QK-norm forbids it for queries and keys. `--smooth`:
scales move from the weights of norms to the columns of the matrices after them, and from the rows
of v to the columns of o. xIELU is not homogeneous, so nothing can move from up to down.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from apertus_mlx.checkpoint import layout
from apertus_mlx.checkpoint.config import ModelConfig
from apertus_mlx.convert.plan.policy import Request
from apertus_mlx.convert.sources.source import Source

# Of the random signs in rotations.
SEED = 0
VALUES, OUTPUT, DOWN = "self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj"
ATTENTION_NORM, FEED_FORWARD_NORM = "attention_layernorm.weight", "feedforward_layernorm.weight"
# What each norm's output goes into.
NORM_READERS = {
    ATTENTION_NORM: ("self_attn.q_proj", "self_attn.k_proj", VALUES),
    FEED_FORWARD_NORM: ("mlp.up_proj",),
}
# What gives up scales -> the matrices whose columns take them.
SMOOTHED = {**NORM_READERS, VALUES: (OUTPUT,)}


def norm_before(path: str) -> str | None:
    """The norm weight whose output goes into the matrix `path`; None where there is none."""
    if path == layout.HEAD:
        return f"{layout.FINAL_NORM}.weight"
    for norm, readers in NORM_READERS.items():
        for reader in readers:
            if path.endswith(f".{reader}"):
                return path.removesuffix(reader) + norm
    return None


def gives_to_matrix(name: str) -> bool:
    """Whether the vector `name` is the weight of a norm whose output goes into matrices."""
    return name.endswith((*NORM_READERS, f"{layout.FINAL_NORM}.weight"))


def value_owners(config: ModelConfig) -> npt.NDArray[np.intp]:
    """For each column of o the row of v that it multiplies; query heads share those of a group."""
    rows = np.arange(config.num_key_value_heads * config.head_dim).reshape(-1, config.head_dim)
    return np.repeat(rows, config.num_attention_heads // config.num_key_value_heads, 0).reshape(-1)


def changed(request: Request, source: Source) -> dict[str, str]:
    """Paths of matrices and names of vectors that change -> the option that changes them."""
    paths, config = list(source.matrices), source.config
    found: dict[str, str] = {}
    if request.smooth:
        readers = tuple(reader for readers in SMOOTHED.values() for reader in readers)
        touched = [path for path in paths if path.endswith(readers)]
        found |= dict.fromkeys(touched + _norms(touched), "--smooth")
    if request.rotate and config.tie_word_embeddings:
        touched = [path for path in paths if path.endswith((VALUES, OUTPUT))]
        found |= dict.fromkeys(touched, "--rotate")
    elif request.rotate:
        found |= dict.fromkeys(paths + _norms(paths), "--rotate")
    return found


def record(request: Request, config: ModelConfig) -> dict[str, Any] | None:
    """What plans and manifests say about it; None without any change."""
    found: dict[str, Any] = {}
    if request.rotate:
        stream = not config.tie_word_embeddings
        found["rotate"] = {"seed": SEED, "residual_stream": stream, "values": True}
    if request.smooth:
        found["smooth"] = True
    return found or None


def _norms(paths: list[str]) -> list[str]:
    return [norm for path in paths if (norm := norm_before(path)) is not None]
