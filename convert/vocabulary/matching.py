"""Two models of which one has a part of the other's vocabulary: what the larger says of the part.

Each reads a text in its own tokens. Where both have a border, what the whole vocabulary's model
gives to a token counts for the first of the pieces in which the part writes it. Where the part is
inside a token of the whole, what counts is how that model would have gone on from the pieces so
far, among the tokens that begin with them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np

from apertus_mlx.checkpoint.config import read_config
from apertus_mlx.convert.evaluation.texts import Tokens, open_tokenizer, same_tokens
from apertus_mlx.convert.vocabulary.byte_pairs import BytePairs, Ids, read_byte_pairs
from apertus_mlx.quant.arrays import Float32
from apertus_mlx.text.byte_alphabet import BYTE_OF_CHARACTER
from apertus_mlx.text.tokenizer import Tokenizer

TOKENIZER = "tokenizer.json"
# A place of which nothing is said.
NOWHERE = -1


def kept_ids(whole: Tokenizer, part: Tokenizer) -> Ids | None:
    """For each id of `part` the id of the same token in `whole`, ascending.

    None where `part` is no part of `whole`, or has its tokens in another order. Ids without a token
    count where all others stay in place.
    """
    if part.vocab_size > whole.vocab_size:
        return None
    names = [part.id_to_token(token_id) for token_id in range(part.vocab_size)]
    if all(whole.id_to_token(token_id) == name for token_id, name in enumerate(names)):
        return np.arange(len(names), dtype=np.int64)
    found = [None if name is None else whole.token_to_id(name) for name in names]
    ids = np.array([-1 if token_id is None else token_id for token_id in found], np.int64)
    return None if ids.min(initial=0) < 0 or (np.diff(ids) <= 0).any() else ids


def match(whole: Path, part: Path) -> Matching | None:
    """How a model's tokens become those of one with a part of them; None where they are the same.

    Args:
        whole: the folder of the model with more tokens.
        part: the folder of one for which `kept_ids` is not None.

    Raises:
        RejectedError: the tokenizer of `part` is no byte-level BPE.
    """
    larger, smaller = open_tokenizer(whole), open_tokenizer(part)
    if same_tokens(larger, smaller):
        return None
    kept = kept_ids(larger, smaller)
    assert kept is not None
    pairs = read_byte_pairs(part / TOKENIZER)
    return Matching(larger, smaller, pairs, kept, read_config(whole).output_vocab_size)


@dataclass(frozen=True, slots=True)
class Reading:
    """Windows `[windows, length]` of the part, and the same text in the whole vocabulary.

    Attributes:
        part: ids of the part.
        whole: ids of the whole vocabulary `[windows, longest]`, filled up at the end.
        places: for each token of the part the last token of the whole that ends with it or before
            it; `NOWHERE` where there is none, or the two have no border in common since.
        inside: how many tokens of the part came since; 0 where both have a border.
    """

    part: Tokens
    whole: Tokens
    places: Ids
    inside: Ids

    @property
    def borders(self) -> tuple[Ids, Ids]:
        """Window and token of the part, where both have a border."""
        windows, tokens = np.nonzero((self.inside == 0) & (self.places != NOWHERE))
        return windows, tokens

    def pieces(self, window: int, token: int) -> tuple[int, ...]:
        """The tokens of the part since the last border of the whole, up to this one."""
        begin = token + 1 - int(self.inside[window, token])
        return tuple(self.part[window, begin : token + 1].tolist())


class Matching:
    """Brings what a model says of tokens of `whole` to the tokens of `part`.

    Args:
        whole: the larger vocabulary.
        part: the smaller one.
        pairs: of the smaller one.
        kept: what `kept_ids` gives of both.
        rows: tokens of the whole that its head has.
    """

    def __init__(
        self, whole: Tokenizer, part: Tokenizer, pairs: BytePairs, kept: Ids, rows: int
    ) -> None:
        self._whole, self._part, self._kept = whole, part, kept
        names = {token_id: whole.id_to_token(token_id) for token_id in range(rows)}
        there = set(kept.tolist())
        # A control token that the part has not is never written, in whatever pieces.
        there |= whole.special_ids
        cut = {
            token_id: name
            for token_id, name in names.items()
            if token_id not in there and name is not None and set(name) <= BYTE_OF_CHARACTER.keys()
        }
        first = np.full(rows, NOWHERE, np.int64)
        heads = kept[kept < rows]
        first[heads] = np.arange(len(heads))
        # What ends in a beginning of pieces; and (token, piece that follows) of those beyond it.
        self._ends: dict[tuple[int, ...], int] = {}
        self._beyond: dict[tuple[int, ...], list[tuple[int, int]]] = {}
        for token_id, pieces in zip(cut, pairs.pieces(cut.values()), strict=True):
            first[token_id] = pieces[0]
            self._ends[pieces] = token_id
            for count in range(1, len(pieces)):
                self._beyond.setdefault(pieces[:count], []).append((token_id, pieces[count]))
        order = np.argsort(first, kind="stable")
        # Rows of the head without a token stand for nothing.
        self._order = order[int((first == NOWHERE).sum()) :]
        self._starts = np.searchsorted(first[self._order], np.arange(len(heads)))
        self._sizes = [
            np.array([len(each.token_bytes(i)) for i in range(each.vocab_size)])
            for each in (whole, part)
        ]

    def read(self, windows: Tokens) -> Reading:
        """The same text in both vocabularies; `windows` are ids of the part."""
        rows = [self._in_whole(window.tolist()) for window in windows]
        whole = np.zeros((len(rows), max(map(len, rows))), np.int64)
        places, inside = np.full(windows.shape, NOWHERE), np.zeros(windows.shape, np.int64)
        for number, (row, window) in enumerate(zip(rows, windows, strict=True)):
            whole[number, : len(row)] = row
            ends, own = (
                sizes[ids].cumsum() for sizes, ids in zip(self._sizes, (row, window), strict=True)
            )
            place = np.searchsorted(ends, own, side="right") - 1
            last = ends[np.maximum(place, 0)]
            border = np.searchsorted(own, last, side="right") - 1
            known = (place >= 0) & (border >= 0) & (own[np.maximum(border, 0)] == last)
            places[number] = np.where(known, place, NOWHERE)
            inside[number] = np.where(known, np.arange(len(own)) - border, 0)
        return Reading(windows, whole, places, inside)

    def first_pieces(self, shares: Float32) -> Float32:
        """What is given `[n, tokens of the whole]` to tokens by their first pieces `[n, part]`."""
        found: Float32 = np.add.reduceat(shares[:, self._order], self._starts, axis=1)
        found /= np.maximum(found.sum(-1, keepdims=True), np.finfo(np.float32).tiny)
        return found

    def logits(self, logits: Float32) -> Float32:
        """The same of logits, to logits."""
        powers = np.exp(logits - logits.max(-1, keepdims=True))
        found: Float32 = np.log(np.maximum(self.first_pieces(powers), np.finfo(np.float32).tiny))
        return found

    def next_pieces(self, shares: Float32, pieces: tuple[int, ...]) -> tuple[Float32, float]:
        """What follows pieces inside a token.

        Args:
            shares: given to the tokens of the whole, before the pieces `[whole]`.
            pieces: of the part, at least one.

        Returns:
            What is given to the tokens of the part as the next piece `[part]`, and what to all
            that may come after a token that ends here. The sum is one, or nothing where the
            pieces begin no token.
        """
        found = np.zeros(len(self._starts), np.float32)
        if pieces not in self._beyond:
            return found, 0.0
        for token_id, following in self._beyond[pieces]:
            found[following] += shares[token_id]
        end = self._kept[pieces[0]] if len(pieces) == 1 else self._ends.get(pieces)
        rest = 0.0 if end is None or end >= len(shares) else float(shares[end])
        total = float(found.sum()) + rest
        return (found / total, rest / total) if total > 0 else (found, 0.0)

    def _in_whole(self, window: list[int]) -> list[int]:
        """The text of a window in the whole vocabulary; control tokens stay what they are."""
        return list(self._pieces_in_whole(window))

    def _pieces_in_whole(self, window: list[int]) -> Iterator[int]:
        for is_control, ids in groupby(window, self._part.special_ids.__contains__):
            if is_control:
                yield from self._kept[list(ids)].tolist()
            else:
                data = b"".join(map(self._part.token_bytes, ids))
                # A window may begin or end inside a character.
                yield from self._whole.encode(data.decode("utf-8", "surrogateescape"))
