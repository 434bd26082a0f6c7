"""A deliberation of so many tokens: then the token that ends it is taken, whatever was drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx


class Thoughts(NamedTuple):
    """Where an answer stands; arrays of shape `[]`, so that nobody waits for them."""

    inside: mx.array  # whether within a deliberation
    spent: mx.array  # tokens since it began
    end: mx.array  # the id that ends it


class ThoughtBudget:
    """Ends each deliberation after `most` tokens of its own."""

    def __init__(
        self,
        most: int,
        pairs: Sequence[tuple[int, int]],
        call_start: int,
        opened: int | None = None,
    ) -> None:
        """Begin an answer.

        Args:
            most: tokens between start and end.
            pairs: ids that begin a deliberation, each with the one that ends it.
            call_start: the id that begins a tool call, which ends a deliberation as well.
            opened: the id that began the deliberation within which the prompt ends, if it does.
        """
        self._most = most
        self._starts = mx.array([start for start, _ in pairs])
        self._ends = mx.array([end for _, end in pairs])
        self._call_start = call_start
        end = next((end for start, end in pairs if start == opened), pairs[0][1])
        self.state = Thoughts(mx.array(opened is not None), mx.array(0), mx.array(end))

    def __call__(self, token: mx.array) -> mx.array:
        """The token (shape `[]`) to take where `token` was drawn; counts it."""
        inside, spent, end = self.state
        token = mx.where(inside & (spent >= self._most), end.astype(token.dtype), token)
        begins = self._starts == token
        leaves = (self._ends == token).any() | (token == self._call_start)
        self.state = Thoughts(
            begins.any() | (inside & ~leaves),
            mx.where(begins.any(), 0, spent + 1),
            mx.where(begins.any(), self._ends[mx.argmax(begins)], end),
        )
        return token
