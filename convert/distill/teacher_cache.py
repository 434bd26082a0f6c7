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
from apertus_mlx.convert.vocabulary.matching import NOWHERE, Matching, Reading
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
    # Their probabilities and the rest, `[windows, length, k + 1]`; they sum to one, or to nothing
    # where the teacher says nothing.
    shares: mx.array

    @property
    def following(self) -> mx.array:
        """The token after each in its window, -1 after the last; `[windows * length]`."""
        end = mx.full((self.tokens.shape[0], 1), -1, self.tokens.dtype)
        return mx.concatenate([self.tokens[:, 1:], end], axis=1).flatten()


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

    def fill(
        self,
        teacher: SourceWeights,
        k: int,
        progress: Callable[[int], None],
        matching: Matching | None = None,
    ) -> None:
        """Compute the answers that are missing.

        Args:
            teacher: any checkpoint.
            k: how many tokens are kept by name.
            progress: told the number of tokens that are done.
            matching: of the teacher's vocabulary and that of the windows, if it is a part of it.
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
            windows = [self._batches[i] for i in lot]
            readings = [matching.read(each) if matching is not None else None for each in windows]
            own = [w if r is None else r.whole for w, r in zip(windows, readings, strict=True)]
            hidden = hidden_states(teacher, own, keep=keep)
            for index, states, reading in zip(lot, hidden, readings, strict=True):
                if matching is None or reading is None:
                    answers = _answers(states, head, k)
                else:
                    answers = _matched_answers(states, head, k, matching, reading)
                save_arrays(self._path(index), answers)
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
        sums = shares.sum(-1, keepdims=True)
        shares /= np.where(sums > 0, sums, 1)
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
        parts.append(_named(mx.softmax(logits, axis=-1, precise=True), k))
    return _joined(parts, states.shape[:2])


def _matched_answers(
    states: Float32, head: Projection, k: int, matching: Matching, reading: Reading
) -> dict[str, np.ndarray]:
    """The same for the tokens of a part of the teacher's vocabulary."""
    windows, tokens = (each.reshape(-1) for each in np.indices(reading.places.shape))
    places, inside = reading.places[windows, tokens], reading.inside[windows, tokens]
    parts = []
    for part in logit_blocks(len(places), len(head.weight)):
        logits = head(mx.array(states[windows[part], np.maximum(places[part], 0)]))
        shares = np.array(mx.softmax(logits, axis=-1, precise=True))
        found = matching.first_pieces(shares)
        rest = np.zeros((len(found), 1), np.float32)
        found[places[part] == NOWHERE] = 0
        for row in np.flatnonzero(inside[part]):
            pieces = reading.pieces(windows[part][row], tokens[part][row])
            found[row], rest[row] = matching.next_pieces(shares[row], pieces)
        parts.append(_named(mx.array(found), k, mx.array(rest)))
    return _joined(parts, reading.places.shape)


def _named(shares: mx.array, k: int, more: mx.array | float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """The likeliest tokens, and their shares and that of the rest with `more`."""
    likeliest = mx.argpartition(shares, kth=-k, axis=-1)[:, -k:].astype(mx.uint32)
    named = mx.take_along_axis(shares, likeliest, axis=-1)
    # Summed up by itself: as one minus the others it would be rounding noise.
    others = mx.put_along_axis(shares, likeliest, mx.array(0.0), axis=-1)
    named = mx.concatenate([named, others.sum(-1, keepdims=True) + more], axis=-1)
    return np.array(likeliest), np.array(named.astype(mx.float16))


def _joined(
    parts: Sequence[tuple[np.ndarray, np.ndarray]], shape: tuple[int, ...]
) -> dict[str, np.ndarray]:
    likeliest, shares = (np.concatenate(each) for each in zip(*parts, strict=True))
    return {
        "likeliest": likeliest.reshape(*shape, -1), "shares": shares.reshape(*shape, -1)
    }  # fmt: skip
