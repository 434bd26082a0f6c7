"""What the teacher says, kept on disk: for each token its likeliest successors and their shares.

The teacher runs once, layer by layer, so that it may be larger than memory. Its answers lie in one
file per batch, each complete or absent; a run that was cut off goes on where files are missing, at
the layer that it had reached.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from apertus_mlx.checkpoint.config import ModelConfig
from apertus_mlx.convert.evaluation.layerwise import (
    SourceWeights,
    head_path,
    hidden_states,
    logit_blocks,
)
from apertus_mlx.convert.evaluation.products import Projection
from apertus_mlx.convert.evaluation.texts import Tokens
from apertus_mlx.convert.write.keep import Keep, load_arrays, save_arrays
from apertus_mlx.errors import ResourceError
from apertus_mlx.quant.arrays import Float32

# Tokens whose hidden states are held at once; for each lot the teacher's layers are read again.
LOT_TOKENS = 1 << 16


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch of windows with what the teacher says about them."""

    # Token ids `[windows, length]`.
    tokens: mx.array
    # The k likeliest next tokens of each, `[windows, length, k]`.
    likeliest: mx.array
    # Their probabilities and the rest, `[windows, length, k + 1]`; they sum to one.
    shares: mx.array


def answer_bytes(k: int) -> int:
    """What the answer to one token takes on disk."""
    return 4 * k + 2 * (k + 1)


def lot_bytes(config: ModelConfig, tokens: int) -> int:
    """What `TeacherCache.fill` keeps of a lot on its way through the layers, twice for a moment."""
    return 2 * 4 * min(tokens, LOT_TOKENS) * config.hidden_size


class TeacherCache:
    """The answers of a teacher to `batches` of windows, in `folder`."""

    def __init__(self, folder: Path, batches: Sequence[Tokens]) -> None:
        self._folder = folder
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    @property
    def tokens(self) -> int:
        """Tokens of all batches."""
        return sum(batch.size for batch in self._batches)

    def fill(self, teacher: SourceWeights, k: int, progress: Callable[[int], None]) -> None:
        """Compute the answers that are missing.

        Args:
            teacher: any checkpoint of the same vocabulary.
            k: how many tokens are kept by name.
            progress: told the number of tokens that are done.
        """
        self._folder.mkdir(exist_ok=True)
        missing = [i for i in range(len(self)) if load_arrays(self._path(i)) is None]
        done = self.tokens - sum(self._batches[i].size for i in missing)
        head = Projection(teacher.matrix(head_path(teacher.config))) if missing else None
        while missing:
            assert head is not None
            size = max(1, LOT_TOKENS // self._batches[missing[0]].size)
            lot, missing = missing[:size], missing[size:]
            state = self._folder / f"states-{lot[0]:06d}-{lot[-1]:06d}.npz"
            for other in self._folder.glob("states-*"):
                if other != state:
                    other.unlink()
            keep = Keep(state)
            hidden = hidden_states(teacher, [self._batches[i] for i in lot], keep=keep)
            for index, states in zip(lot, hidden, strict=True):
                save_arrays(self._path(index), _answers(states, head, k))
                done += self._batches[index].size
                progress(done)
            keep.discard()

    def batch(self, index: int) -> Batch:
        """Batch `index` with the teacher's answers."""
        answers = load_arrays(self._path(index))
        if answers is None:
            raise ResourceError(
                f"{self._path(index)}: was damaged or taken away meanwhile; --resume makes it anew"
            )
        shares = answers["shares"].astype(np.float32)
        shares /= shares.sum(-1, keepdims=True)
        likeliest = mx.array(answers["likeliest"])
        return Batch(mx.array(self._batches[index]), likeliest, mx.array(shares))

    def _path(self, index: int) -> Path:
        return self._folder / f"{index:06d}.npz"


def _answers(states: Float32, head: Projection, k: int) -> dict[str, np.ndarray]:
    """Likeliest tokens `[windows, length, k]` and shares `[..., k + 1]` in float16."""
    rows = states.reshape(-1, states.shape[-1])
    parts = []
    for part in logit_blocks(len(rows), len(head.weight)):
        logits = head(mx.array(rows[part]))
        shares = mx.softmax(logits, axis=-1, precise=True)
        likeliest = mx.argpartition(shares, kth=-k, axis=-1)[:, -k:].astype(mx.uint32)
        named = mx.take_along_axis(shares, likeliest, axis=-1)
        # Summed up by itself: as one minus the others it would be rounding noise.
        others = mx.put_along_axis(shares, likeliest, mx.array(0.0), axis=-1)
        named = mx.concatenate([named, others.sum(-1, keepdims=True)], axis=-1)
        parts.append((np.array(likeliest), np.array(named.astype(mx.float16))))
    return {
        name: np.concatenate(found).reshape(*states.shape[:2], -1)
        for name, found in zip(("likeliest", "shares"), zip(*parts, strict=True), strict=True)
    }
