"""`apertus_mlx_tokenizer.bin`: a byte-level BPE vocabulary in the form in which it is looked up.

`tokenizer.json` of an Apertus model has 17 MB of text, and to read it takes most of the time until
the first token of a small model. The same vocabulary as arrays is opened in milliseconds.

All numbers are little-endian. In order, without gaps:

    magic           8 bytes, `APTOKEN1`
    digest          32 bytes, the SHA-256 of the `tokenizer.json` that this is made from
    checksum        uint32, the CRC-32 of all that follows
    header_bytes    uint32, then as many bytes of JSON, padded with blanks so that the next part
                    starts at a multiple of 8: `tokens` (N), `sorted` (V), `merges` (M), and of
                    `tokenizer.json`: `added_tokens`, `pre_tokenizer`, `ignore_merges`
    pairs           M uint64, ascending: left id * 2**32 + right id
    ranks           M uint32, of the pair at the same place; the lowest merges first
    results         M uint32, the id that the pair becomes
    by_bytes        V uint32, the ids of the vocabulary in the order of their bytes
    offsets         N + 1 uint32, where the bytes of an id begin among the token bytes
    token bytes     of all ids in order, added tokens by their text
"""

from __future__ import annotations

import json
import struct
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Literal
from zlib import crc32

import numpy as np

from apertus_mlx.text.byte_alphabet import BYTE_OF_CHARACTER

FILE_NAME = "apertus_mlx_tokenizer.bin"
MAGIC = b"APTOKEN1"
MAX_TABLE_BYTES = 2**28
_START = struct.Struct("<8s32sII")
_CHECKED_FROM = 44
_TO_BYTES = {ord(character): byte for character, byte in BYTE_OF_CHARACTER.items()}


class TableError(ValueError):
    """These bytes are no table, or one of another file; or the file is none that has a table."""


@dataclass(frozen=True, slots=True)
class TokenTable:
    """A vocabulary, ready to be looked up.

    Attributes:
        added_tokens: as in `tokenizer.json`: id, content and flags of each.
        pre_tokenizer: as in `tokenizer.json`.
        ignore_merges: whether a piece that is a token as a whole is taken without merging.
        size: ids are below it.
        longest: no token has more bytes.
    """

    added_tokens: list[Mapping[str, Any]]
    pre_tokenizer: Mapping[str, Any] | None
    ignore_merges: bool
    size: int
    longest: int
    _pairs: memoryview[int]
    _ranks: memoryview[int]
    _results: memoryview[int]
    _by_bytes: memoryview[int]
    _offsets: memoryview[int]
    _bytes: bytes

    def token(self, token_id: int) -> bytes:
        """The bytes of an id; none for one that is not there."""
        if not 0 <= token_id < self.size:
            return b""
        return self._bytes[self._offsets[token_id] : self._offsets[token_id + 1]]

    def find(self, piece: bytes) -> int | None:
        """The id of the entry with just these bytes, None if there is none; no added token."""
        at = bisect_left(self._by_bytes, piece, key=self.token)
        if at == len(self._by_bytes):
            return None
        found = self._by_bytes[at]
        return found if self.token(found) == piece else None

    def merge(self, left: int, right: int) -> tuple[int, int] | None:
        """Rank and result of merging two ids, None if no rule does."""
        pair = left << 32 | right
        at = bisect_left(self._pairs, pair)
        if at == len(self._pairs) or self._pairs[at] != pair:
            return None
        return self._ranks[at], self._results[at]


def build_table(data: bytes, source: Mapping[str, Any]) -> bytes:
    """Make the table of a `tokenizer.json`.

    Args:
        data: the file as it lies there, for the digest.
        source: what it says.

    Raises:
        TableError: not all entries of it are bytes or added tokens, each with an id of its own.
    """
    vocab, added = source["model"]["vocab"], source["added_tokens"]
    contents: dict[int, bytes] = {token["id"]: token["content"].encode() for token in added}
    plain = {name: token_id for name, token_id in vocab.items() if token_id not in contents}
    if not BYTE_OF_CHARACTER.keys() >= set().union(*plain):
        raise TableError("has no table: an entry of its vocabulary is no bytes")
    size = max([*plain.values(), *contents], default=-1) + 1
    tokens = [b""] * size
    try:
        for name, token_id in plain.items():
            tokens[token_id] = name.translate(_TO_BYTES).encode("latin-1")
        rules = _rules(source["model"]["merges"], vocab)
    except KeyError as error:
        raise TableError(f"has no table: it merges what it has not ({error})") from None
    if sum(map(bool, tokens)) != len(plain):
        raise TableError("has no table: two entries share an id, or one is empty")
    by_bytes = sorted(plain.values(), key=tokens.__getitem__)
    for token_id, content in contents.items():
        tokens[token_id] = content
    header = {
        "tokens": size,
        "sorted": len(by_bytes),
        "merges": len(rules),
        "added_tokens": added,
        "pre_tokenizer": source["pre_tokenizer"],
        "ignore_merges": bool(source["model"].get("ignore_merges")),
    }
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-(_START.size + len(text)) % 8)
    pairs = sorted(rules)
    offsets = np.zeros(size + 1, "<u4")
    np.cumsum([len(token) for token in tokens], out=offsets[1:])
    body = b"".join(
        [
            struct.pack("<I", len(text)),
            text,
            np.array(pairs, "<u8").tobytes(),
            np.array([rules[pair][0] for pair in pairs], "<u4").tobytes(),
            np.array([rules[pair][1] for pair in pairs], "<u4").tobytes(),
            np.array(by_bytes, "<u4").tobytes(),
            offsets.tobytes(),
            *tokens,
        ]
    )
    return MAGIC + sha256(data).digest() + struct.pack("<I", crc32(body)) + body


def _rules(merges: list[Any], vocab: Mapping[str, int]) -> dict[int, tuple[int, int]]:
    """Rank and result by pair; of a pair that stands there twice the last counts."""
    rules = {}
    for rank, merge in enumerate(merges):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        rules[vocab[left] << 32 | vocab[right]] = (rank, vocab[left + right])
    return rules


def read_table(table: bytes, digest: bytes) -> TokenTable:
    """Open a table.

    Args:
        table: the bytes of the file.
        digest: the SHA-256 of the `tokenizer.json` that it must be made from.

    Raises:
        TableError: it is damaged, or made from another file.
    """
    try:
        magic, made_from, checksum, header_bytes = _START.unpack_from(table)
        if (magic, made_from) != (MAGIC, digest):
            raise TableError("is made from another tokenizer.json")
        if crc32(memoryview(table)[_CHECKED_FROM:]) != checksum:
            raise TableError("is damaged")
        at = _START.size + header_bytes
        header = json.loads(table[_START.size : at])
        size, entries, merges = header["tokens"], header["sorted"], header["merges"]
        pairs, at = _array(table, at, merges, "Q")
        ranks, at = _array(table, at, merges, "I")
        results, at = _array(table, at, merges, "I")
        by_bytes, at = _array(table, at, entries, "I")
        offsets, at = _array(table, at, size + 1, "I")
        _require_inside(results, by_bytes, offsets, size, len(table) - at)
        return TokenTable(
            [_added_token(token, size) for token in header["added_tokens"]],
            header["pre_tokenizer"],
            header["ignore_merges"] is True,
            size,
            int(np.diff(np.asarray(offsets)).max(initial=1)),
            pairs,
            ranks,
            results,
            by_bytes,
            offsets,
            table[at:],
        )
    except TableError:
        raise
    except (struct.error, ValueError, TypeError, KeyError, RecursionError) as error:
        raise TableError(f"is damaged ({error})") from None


def _added_token(token: Any, size: int) -> Mapping[str, Any]:
    wanted = {"id": int, "content": str, "special": bool}
    if any(type(token[key]) is not kind for key, kind in wanted.items()):
        raise TableError("is damaged (an added token without id, content or flag)")
    if not 0 <= token["id"] < size:
        raise TableError("is damaged (an added token beyond its tokens)")
    if not token["content"]:
        raise TableError("is damaged (an added token without text)")
    return dict(token)


def _array(
    table: bytes, at: int, count: int, kind: Literal["Q", "I"]
) -> tuple[memoryview[int], int]:
    """`count` numbers that begin at byte `at`, and where they end."""
    end = at + count * (8 if kind == "Q" else 4)
    if count < 0 or end > len(table):
        raise TableError("is damaged (it ends too soon)")
    return memoryview(table)[at:end].cast(kind), end


def _require_inside(
    results: memoryview[int],
    by_bytes: memoryview[int],
    offsets: memoryview[int],
    size: int,
    token_bytes: int,
) -> None:
    """Refuse numbers that lead out of the table."""
    ids = np.concatenate([np.asarray(results), np.asarray(by_bytes)])
    ends = np.asarray(offsets)
    if ids.size and int(ids.max()) >= size:
        raise TableError("is damaged (an id beyond its tokens)")
    if ends[0] or ends[-1] != token_bytes or (ends[1:] < ends[:-1]).any():
        raise TableError("is damaged (its tokens do not fill it in order)")
