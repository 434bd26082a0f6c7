"""One decode step of several rows: an MLX model computes them together, another one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx

from apertus_mlx.cache import FullCache, QuantizedCache
from apertus_mlx.cache.rows import rows_of
from apertus_mlx.errors import ApertusError
from apertus_mlx.generation.row import Row
from apertus_mlx.model.apertus import Model
from apertus_mlx.model.language_model import LanguageModel, NextTokenLogits


class Event(NamedTuple):
    """What happened to a row: a token came, some of its prompt was read, or it failed and is out.

    After its last token (`row.left` is 0) it has left by itself. `logits` `[vocabulary]` are what
    the model computed before the token, without penalties and what else changed them.
    """

    row: Row
    token: int | None = None
    logits: mx.array | None = None
    error: Exception | None = None


def advance(model: LanguageModel, rows: Sequence[Row]) -> list[Event]:
    """Compute the token of each row, and meanwhile what follows."""
    going = [row for row in rows if row.left > 1]
    for row, after in zip(going, _logits(model, going), strict=True):
        row.follow(after)
    mx.async_eval([row.pending() for row in rows])
    return [_value(row) for row in rows]


def _logits(model: LanguageModel, rows: Sequence[Row]) -> list[NextTokenLogits]:
    """Logits after the token of each row."""
    caches = [row.caches for row in rows if row.caches is not None]
    if len(rows) < 2 or not isinstance(model, Model):
        return [
            model.next_token_logits(row.token.reshape(1, 1), own)
            for row, own in zip(rows, caches, strict=True)
        ]
    ours = [
        [layer for layer in own if isinstance(layer, FullCache | QuantizedCache)] for own in caches
    ]
    tokens = mx.stack([row.token for row in rows])[:, None]
    logits = model.logits(model.model(tokens, rows_of(ours)))
    return [NextTokenLogits(logits[index, 0]) for index in range(len(rows))]


def _value(row: Row) -> Event:
    try:
        return Event(row, row.value(), row.logits)
    except ApertusError as error:
        return Event(row, error=error)
