"""Pieces of an answer through an output filter."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from apertus_mlx.text.output_filter import FilterStream, OutputFilter
from apertus_mlx.text.pieces import CallPiece, Piece


@dataclass(slots=True)
class _Open:
    """The text that pieces are part of: what they have in common, and its way."""

    kind: str
    index: int | None
    stream: FilterStream


class PieceFilter:
    """Filters what an answer says: its text, its thoughts, and the arguments of each call.

    Each is a text of its own. It ends where another begins, so that nothing changes its order.
    """

    def __init__(self, output_filter: OutputFilter) -> None:
        """Start with the beginning of an answer."""
        self._filter = output_filter
        self._open: _Open | None = None

    def push(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
        """Take the next pieces; yield those that are certain now."""
        for piece in pieces:
            call = piece.call
            index = None if call is None else call.index
            if self._open is None or (self._open.kind, self._open.index) != (piece.kind, index):
                yield from self.finish()
                kind = "arguments" if piece.kind == "call" else piece.kind
                self._open = _Open(piece.kind, index, self._filter.begin(kind))
            if call is not None and (call.withdrawn or call.id is not None):
                if call.withdrawn:
                    self._open = None
                yield piece
            else:
                text = piece.text if call is None else call.arguments
                yield from _pieces(self._open, self._open.stream.push(text))

    def finish(self) -> Iterator[Piece]:
        """Yield what was held back: no piece follows, or one of another text."""
        if self._open is not None:
            opened, self._open = self._open, None
            yield from _pieces(opened, opened.stream.finish())


def _pieces(opened: _Open, text: str) -> Iterator[Piece]:
    if not text:
        return
    if opened.index is None:
        yield Piece(text, is_thought=opened.kind == "thought")
    else:
        yield Piece("", call=CallPiece(opened.index, arguments=text))
