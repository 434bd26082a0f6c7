"""The forms in which commands show things: data on stdout, everything else on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from apertus_mlx.cli import sink

if TYPE_CHECKING:
    from apertus_mlx.generation.run import Piece


# Between the tokens of JSON a line break says what a blank says, and within strings there is none.
_ONE_LINE = str.maketrans("\r\n", "  ")


def print_json(value: Mapping[str, Any]) -> None:
    """Write one JSON object to stdout."""
    encoding = (sys.stdout.encoding or "").lower().replace("-", "")
    text = json.dumps(value, ensure_ascii=encoding != "utf8", indent=2)
    sink.put_exactly(sink.printable_json(text) + "\n")


@dataclass(frozen=True, slots=True)
class Table:
    """An aligned plain-text table; its first column is left-aligned, the others right."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def lines(self) -> Iterator[str]:
        """The table as text."""
        widths = [max(map(len, column)) for column in zip(self.header, *self.rows, strict=True)]
        for row in (self.header, *self.rows):
            cells = [row[0].ljust(widths[0])]
            cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
            yield "  ".join(cells).rstrip()


def print_report(
    json: bool,
    values: Callable[[], Mapping[str, Any]],
    words: Callable[[], Iterable[str | Table]],
) -> None:
    """Write a command's result: its values as JSON, or what people read, line by line."""
    if json:
        print_json(values())
        return
    for part in words():
        for line in part.lines() if isinstance(part, Table) else [part]:
            sink.put(line)


def print_pieces(pieces: Iterable[Piece]) -> None:
    """Write an answer and a newline to stdout as it comes, the deliberation before it to stderr.

    A tool call is a line of its own: the tool's name, a blank, the arguments.

    An interrupt or an error leaves the newline behind what there was. On a terminal with controls
    escaped: a model's text must not give it orders. Into a pipe or file as it is.
    """
    exact = not sys.stdout.isatty()
    thinking = in_call = False
    missing = ""
    try:
        for piece in pieces:
            if thinking and not piece.is_thought:
                sink.note("")
            thinking = piece.is_thought
            if thinking:
                sink.note(piece.text, end="", keep=sink.LAYOUT)
                continue
            begins_line = in_call if piece.call is None else piece.call.id is not None
            text = (missing if begins_line else "") + _line_of_call(piece)
            in_call = piece.call is not None
            missing = "\n"
            if exact:
                sink.put_exactly(text)
            else:
                sink.put(text, end="", keep=sink.LAYOUT)
        missing = "\n"
    finally:
        if thinking:
            sink.note("")
        sink.put("", end=missing)


def _line_of_call(piece: Piece) -> str:
    """The piece's text; of a call a part of its line, which no line break of JSON ends."""
    if piece.call is None:
        return piece.text
    name = "" if piece.call.name is None else f"{piece.call.name} "
    return (name + piece.call.arguments).translate(_ONE_LINE)
