"""`tokenizer.json` as a byte-pair encoding that can be cut: what is kept is complete by itself.

The tokens below `floor` are the added tokens and the 256 bytes. Every other token has to split, by
one of the merges, into two tokens with lower ids. Then any set of tokens that holds the floor and,
with each token, one of its splits, writes every text.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from apertus_mlx.convert.plan.policy import MULTIPLE
from apertus_mlx.errors import RejectedError, UsageError
from apertus_mlx.system.strict_json import parse_object
from apertus_mlx.text.byte_alphabet import BYTE_OF_CHARACTER, CHARACTER_OF_BYTE
from apertus_mlx.text.tokenizer_file import read_tokenizer_file

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class BytePairs:
    """The vocabulary and the merges of a `tokenizer.json`.

    Attributes:
        path: the file, for messages.
        source: what it says.
        names: token by id; added tokens are among them.
        floor: added tokens and bytes have the ids below it.
        pairs: (left, right, result) of each merge, lowest rank first.
    """

    path: Path
    source: Mapping[str, Any]
    names: Mapping[int, str]
    floor: int
    pairs: Sequence[tuple[int, int, int]]

    @property
    def size(self) -> int:
        """Ids are below it."""
        return max(self.names) + 1

    def prefix(self, size: int) -> Ids:
        """The first `size` ids.

        Raises:
            UsageError: a byte or a control token would be lost.
            RejectedError: what is kept would be no complete encoding.
        """
        if size < self.floor:
            least = -(-self.floor // MULTIPLE) * MULTIPLE
            raise UsageError(
                f"--vocab {size}: control tokens and bytes take the ids up to {self.floor - 1} of "
                f"{self.path}; the least is {least}"
            )
        kept = np.arange(size, dtype=np.int64)
        self._require_splits(kept)
        return kept

    def closure(self, used: Iterable[int], limit: int) -> Ids:
        """The floor and the ids in `used`, with all that their merging passes through.

        A text that becomes ids of `used` becomes the same tokens afterwards. It is filled up with
        the lowest other ids to a multiple of 64, as far as there are `limit` ids.

        Raises:
            RejectedError: what is kept would be no complete encoding.
        """
        rules, letters = self._rules(), self._letters()
        first = self._first_splits()
        kept = set(range(self.floor))
        waiting = [token_id for token_id in used if token_id >= self.floor]
        while waiting:
            token_id = waiting.pop()
            if token_id in kept or token_id not in self.names:
                continue
            kept.add(token_id)
            met, _ = _merging([letters[letter] for letter in self.names[token_id]], rules)
            waiting += met
            if token_id not in met:
                # A piece of a text that is a token as a whole, which merging does not reach.
                waiting += first.get(token_id, ())
        size = min(-(-len(kept) // MULTIPLE) * MULTIPLE, limit)
        for token_id in range(self.floor, limit):
            if len(kept) >= size:
                break
            kept.add(token_id)
        found = np.array(sorted(kept), np.int64)
        self._require_splits(found)
        return found

    def cut(self, kept: Ids) -> bytes:
        """The `tokenizer.json` of the ids in `kept`, which become 0, 1, ... in this order."""
        new = {int(old): index for index, old in enumerate(kept)}
        model = dict(self.source["model"])
        model["vocab"] = {
            name: new[token_id] for name, token_id in model["vocab"].items() if token_id in new
        }
        model["merges"] = [
            merge
            for merge, pair in zip(model["merges"], self.pairs, strict=True)
            if all(token_id in new for token_id in pair)
        ]
        value = {**self.source, "model": model}
        return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()

    def pieces(self, names: Iterable[str]) -> list[tuple[int, ...]]:
        """The tokens that the bytes of each of these names become; they may be no tokens here."""
        rules, letters = self._rules(), self._letters()
        return [tuple(_merging([letters[letter] for letter in name], rules)[1]) for name in names]

    def _rules(self) -> dict[tuple[int, int], tuple[int, int]]:
        """Of each pair the rank of its merge, and what it makes."""
        return {(left, right): (rank, result) for rank, (left, right, result) in
                enumerate(self.pairs)}  # fmt: skip

    def _letters(self) -> dict[str, int]:
        """The tokens of single bytes by their names."""
        return {name: token_id for token_id, name in self.names.items() if len(name) == 1}

    def _first_splits(self) -> dict[int, tuple[int, int]]:
        """Of each token the merge with the lowest rank that makes it from lower ids."""
        found: dict[int, tuple[int, int]] = {}
        for left, right, result in self.pairs:
            if max(left, right) < result:
                found.setdefault(result, (left, right))
        return found

    def _require_splits(self, kept: Ids) -> None:
        """Refuse a set in which a token has no split.

        Raises:
            RejectedError: names the token.
        """
        there = set(kept.tolist())
        split = {
            result
            for left, right, result in self.pairs
            if max(left, right) < result and left in there and right in there
        }
        for token_id in kept.tolist():
            if token_id >= self.floor and token_id in self.names and token_id not in split:
                raise RejectedError(
                    f"{self.path}: token {token_id} ({self.names[token_id][:40]!r}) does not split "
                    "into two tokens with lower ids, so this vocabulary cannot be cut; leave out "
                    "--vocab and --vocab-for"
                )


def read_byte_pairs(path: Path) -> BytePairs:
    """Read a `tokenizer.json` that the tokenizers library takes for one.

    Raises:
        RejectedError: it is damaged, or no byte-level BPE.
    """
    source = parse_object(read_tokenizer_file(path), str(path))
    try:
        vocab: dict[str, int] = source["model"]["vocab"]
        added = {token["id"]: token["content"] for token in source["added_tokens"]}
        names = {token_id: name for name, token_id in vocab.items()} | added
        plain = [name for name, token_id in vocab.items() if token_id not in added]
        bytes_ids = [vocab[letter] for letter in CHARACTER_OF_BYTE.values()]
        pairs = []
        for merge in source["model"]["merges"]:
            left, right = merge.split(" ") if isinstance(merge, str) else merge
            pairs.append((vocab[left], vocab[right], vocab[left + right]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RejectedError(f"{path}: is no byte-level BPE that can be cut ({error})") from None
    if not BYTE_OF_CHARACTER.keys() >= set().union(*plain):
        raise RejectedError(
            f"{path}: an entry of its vocabulary is no bytes; only a byte-level BPE can be cut"
        )
    return BytePairs(path, source, names, 1 + max([*bytes_ids, *added]), pairs)


def _merging(
    ids: list[int], rules: Mapping[tuple[int, int], tuple[int, int]]
) -> tuple[list[int], list[int]]:
    """Merge bytes, lowest rank first: all tokens that come up on the way, and what is left."""
    met = []
    while found := [(*rules[pair], at) for at, pair in enumerate(pairwise(ids)) if pair in rules]:
        _, result, at = min(found)
        ids[at : at + 2] = [result]
        met.append(result)
    return met, ids
