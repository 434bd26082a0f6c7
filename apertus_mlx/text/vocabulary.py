"""What a tokenizer needs of a vocabulary, and its two forms: the tokenizers library and a table."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from itertools import groupby, pairwise
from typing import NamedTuple, Protocol

import tokenizers

from apertus_mlx.system.rust_panics import guarded
from apertus_mlx.text.byte_alphabet import BYTE_OF_CHARACTER, CHARACTER_OF_BYTE
from apertus_mlx.text.token_table import TableError, TokenTable

# Longer texts, and pieces of more bytes, are left to the library: it merges sooner than Python, the
# time included in which it reads its file.
LONG_TEXT, LONG_PIECE = 2**16, 2**9
MAX_REMEMBERED_PIECES = 2**14


class Added(NamedTuple):
    """An added token."""

    content: str
    special: bool


class Vocabulary(Protocol):
    """Tokens and their ids, and how a text is cut into them.

    Attributes:
        added: the added tokens by id.
        size: ids are below it.
    """

    added: Mapping[int, Added]
    size: int

    @property
    def longest_token_bytes(self) -> int:
        """No token has more bytes."""

    def encode(self, text: str) -> list[int]:
        """The ids of a text without surrogates; no special token is found in it.

        Raises:
            PanicError: the pattern that cuts texts gives up.
        """

    def keeps(self, ids: list[int], text: str) -> bool:
        """Whether the ids stand for just this text."""

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of an id, added tokens by their text; none for one that is not there."""

    def name(self, token_id: int) -> str | None:
        """How `tokenizer.json` writes the token."""

    def find(self, name: str) -> int | None:
        """The id of a name, None if there is none."""


class LibraryVocabulary:
    """The tokenizers library's."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        """Take a backend that `read_backend` has checked."""
        self._backend = backend
        self.added: Mapping[int, Added] = {
            token_id: Added(token.content, token.special)
            for token_id, token in backend.get_added_tokens_decoder().items()
        }
        self.size = max(
            [backend.get_vocab_size(with_added_tokens=True), *(i + 1 for i in self.added)]
        )

    @functools.cached_property
    def longest_token_bytes(self) -> int:
        """See `Vocabulary`."""
        # A token of the vocabulary has a character a byte; an added one, which is few, may not.
        names = self._backend.get_vocab(with_added_tokens=False)
        added = [len(token.content.encode()) for token in self.added.values()]
        return max([1, *map(len, names), *added])

    def encode(self, text: str) -> list[int]:
        """See `Vocabulary`."""
        ids: list[int] = guarded(self._backend.encode, text, add_special_tokens=False).ids
        return ids

    def keeps(self, ids: list[int], text: str) -> bool:
        """See `Vocabulary`."""
        if self._backend.decode(ids, skip_special_tokens=False) == text:
            return True
        return b"".join(map(self.token_bytes, ids)) == text.encode()

    def token_bytes(self, token_id: int) -> bytes:
        """See `Vocabulary`."""
        if token_id in self.added:
            return self.added[token_id].content.encode()
        name = self._backend.id_to_token(token_id) or ""
        try:
            return bytes([BYTE_OF_CHARACTER[character] for character in name])
        except KeyError:  # an entry that no text becomes
            return name.encode()

    def name(self, token_id: int) -> str | None:
        """See `Vocabulary`."""
        return self._backend.id_to_token(token_id)

    def find(self, name: str) -> int | None:
        """See `Vocabulary`."""
        return self._backend.token_to_id(name)


class TableVocabulary:
    """A table's; the library cuts a text into pieces, each is then merged here.

    Attributes:
        cutter: a backend of the library with the same added tokens and pre-tokenizer, whose
            vocabulary is the 256 bytes.
    """

    def __init__(self, table: TokenTable, whole: Callable[[], tokenizers.Tokenizer]) -> None:
        """Take an opened table; `whole` reads `tokenizer.json`, for texts that are long.

        Raises:
            TableError: a byte has no token, or the library refuses the rest.
        """
        self._table = table
        self._whole = functools.cache(lambda: LibraryVocabulary(whole()))
        self.added: Mapping[int, Added] = {
            token["id"]: Added(token["content"], token["special"]) for token in table.added_tokens
        }
        self.size = table.size
        names: dict[str, int] = {}
        for byte, character in CHARACTER_OF_BYTE.items():
            token_id = table.find(bytes([byte]))
            if token_id is None:
                raise TableError(f"has no token for byte {byte:#04x}")
            names[character] = token_id
        self._ids_by_content = {token.content: token_id for token_id, token in self.added.items()}
        self.cutter = _cutter(table, names | self._ids_by_content)
        self._remembered: dict[tuple[int, ...], list[int]] = {}

    @property
    def longest_token_bytes(self) -> int:
        """See `Vocabulary`."""
        return self._table.longest

    def encode(self, text: str) -> list[int]:
        """See `Vocabulary`."""
        if len(text) > LONG_TEXT:
            return self._whole().encode(text)
        cut = guarded(self.cutter.encode, text, add_special_tokens=False)
        ids: list[int] = []
        for _, piece in groupby(zip(cut.word_ids, cut.ids, strict=True), key=lambda pair: pair[0]):
            parts = tuple(token_id for _, token_id in piece)
            if len(parts) > LONG_PIECE:
                return self._whole().encode(text)
            ids += self._merged(parts)
        return ids

    def _merged(self, parts: tuple[int, ...]) -> list[int]:
        """The ids of one piece, from those of its bytes; or the added token that it is."""
        found = self._remembered.get(parts)
        if found is None:
            if len(self._remembered) >= MAX_REMEMBERED_PIECES:
                self._remembered.clear()
            found = self._remembered[parts] = self._merge(parts)
        return found

    def _merge(self, parts: tuple[int, ...]) -> list[int]:
        """Byte-pair encoding (Sennrich et al., arXiv 1508.07909): the lowest rank first."""
        table = self._table
        ids = list(parts)
        if table.ignore_merges and len(parts) > 1:
            whole = table.find(b"".join(map(table.token, parts)))
            if whole is not None:
                return [whole]
        rules = [table.merge(*pair) for pair in pairwise(ids)]
        while found := [(rule, at) for at, rule in enumerate(rules) if rule is not None]:
            (_, result), at = min(found)
            ids[at : at + 2] = [result]
            del rules[at]
            if at:
                rules[at - 1] = table.merge(ids[at - 1], result)
            if at < len(rules):
                rules[at] = table.merge(result, ids[at + 1])
        return ids

    def keeps(self, ids: list[int], text: str) -> bool:
        """See `Vocabulary`."""
        return b"".join(map(self._table.token, ids)) == text.encode()

    def token_bytes(self, token_id: int) -> bytes:
        """See `Vocabulary`."""
        return self._table.token(token_id)

    def name(self, token_id: int) -> str | None:
        """See `Vocabulary`."""
        if token_id in self.added:
            return self.added[token_id].content
        token = self._table.token(token_id)
        return "".join(CHARACTER_OF_BYTE[byte] for byte in token) or None

    def find(self, name: str) -> int | None:
        """See `Vocabulary`."""
        if name in self._ids_by_content:
            return self._ids_by_content[name]
        try:
            return self._table.find(bytes([BYTE_OF_CHARACTER[character] for character in name]))
        except KeyError:
            return None


def _cutter(table: TokenTable, ids: Mapping[str, int]) -> tokenizers.Tokenizer:
    source = {
        "version": "1.0",
        "added_tokens": table.added_tokens,
        "pre_tokenizer": table.pre_tokenizer,
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": True,
            "use_regex": True,
        },
        "model": {"type": "BPE", "vocab": ids, "merges": []},
    }
    try:
        return guarded(tokenizers.Tokenizer.from_str, json.dumps(source))
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - the library has no class of its own
        raise TableError(f"is refused by the tokenizers library ({error})") from None
