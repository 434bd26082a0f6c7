"""What a model says of the next token."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx


@dataclass(frozen=True, slots=True)
class Scores:
    """Logits of the next token, with what the same pass may have found out about them.

    `best` and `peaks` save a second look at 131,072 logits; a model may leave both out.
    """

    # `[vocabulary]`.
    logits: mx.array
    # The token of the largest logit, shape `[]`.
    best: mx.array | None = None
    # The largest logit of each run of `vocabulary / len(peaks)` tokens.
    peaks: mx.array | None = None
