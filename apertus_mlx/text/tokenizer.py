"""A checkpoint's tokenizer.json: text to token ids and back, with the chat roles known by id."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import tokenizers

from apertus_mlx.errors import RejectedError, UsageError
from apertus_mlx.system.rust_panics import PanicError, guarded
from apertus_mlx.text.byte_alphabet import BYTE_OF_CHARACTER, CHARACTER_OF_BYTE
from apertus_mlx.text.roles import Roles, find_roles
from apertus_mlx.text.tokenizer_file import read_backend

# Every kind of character that a tokenizer's patterns tell apart.
PROBE = "The 12 Zürich-trains'll leave\n\n  at 7:30\t(日本, हिन्दी, العربية) 🏔️ \r\n"
LONG_TEXT = 2**16
_SURROGATE = re.compile("[\ud800-\udfff]")


class Tokenizer:
    """A byte-level BPE tokenizer with the control tokens of Apertus.

    Attributes:
        vocab_size: Rows of the model's embedding; every id is below it.
        bos_id: The id every sequence starts with, or None where the model has none.
        special_ids: Ids that plain text can never become.
        roles: What the control tokens mean in an answer.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        name: str,
        vocab_size: int,
        bos_id: int | None,
        roles: Roles,
    ):
        """Wrap a loaded backend; use `load`, which checks it."""
        added = backend.get_added_tokens_decoder()
        self._backend = backend
        self._name = name
        self._added_bytes = {i: token.content.encode() for i, token in added.items()}
        self._special_by_text = {t.content: i for i, t in added.items() if t.special}
        self._special_starts = re.compile(
            "[" + "".join(sorted({re.escape(text[0]) for text in self._special_by_text})) + "]"
        )
        self._special_lengths = sorted({len(text) for text in self._special_by_text}, reverse=True)
        self.vocab_size = vocab_size
        self.bos_id = bos_id
        self.roles = roles
        self.special_ids = frozenset(self._special_by_text.values())

    @classmethod
    def load(cls, directory: Path, *, vocab_size: int, bos_token_id: int | None) -> Tokenizer:
        """Read `directory/tokenizer.json`.

        Args:
            directory: The checkpoint.
            vocab_size: Rows of the model's embedding, from its config.
            bos_token_id: From the config; None for a model without one.

        Raises:
            RejectedError: the file is missing or damaged, is not a byte-level BPE with the Apertus
                control tokens, or has ids that the model has no embedding for.
        """
        path = directory / "tokenizer.json"
        backend = read_backend(path)
        added = backend.get_added_tokens_decoder()
        size = backend.get_vocab_size(with_added_tokens=True)
        largest = max([size - 1, *added])
        if largest >= vocab_size:
            raise RejectedError(
                f"{path}: has ids up to {largest}, but vocab_size in config.json is {vocab_size}"
            )
        special = {token_id: token.content for token_id, token in added.items() if token.special}
        roles = find_roles(special, str(path))
        if bos_token_id is not None and not (
            0 <= bos_token_id < vocab_size and bos_token_id in special
        ):
            raise RejectedError(
                f"{path}: bos_token_id {bos_token_id} of the config is not a special token here"
            )
        tokenizer = cls(
            backend, name=str(path), vocab_size=vocab_size, bos_id=bos_token_id, roles=roles
        )
        tokenizer.encode(PROBE)
        return tokenizer

    def encode(self, text: str) -> list[int]:
        """Return the ids of plain text: no BOS, and no special id whatever the text contains.

        Bytes that are no UTF-8 are kept: a lone surrogate as Python's `surrogateescape` makes it
        becomes the token of its byte.

        Raises:
            RejectedError: the tokenizer file is to blame: it maps plain text to an id that it must
                not have, changes or loses text, or its pattern fails on an ordinary text.
            UsageError: the text is too long or too uniform for the tokenizer's pattern.
        """
        ids: list[int] = []
        position = 0
        for match in _SURROGATE.finditer(text):
            ids += self._encode_valid(text[position : match.start()])
            ids += self._byte_tokens(match.group())
            position = match.end()
        return ids + self._encode_valid(text[position:] if position else text)

    def split_special(self, text: str) -> Iterator[str | int]:
        """Yield `text` in order as plain pieces and the ids of the special tokens written in it.

        The leftmost, then longest token wins, as in the tokenizers library.
        """
        plain_from = search_from = 0
        while match := self._special_starts.search(text, search_from):
            start = match.start()
            search_from = start + 1
            for length in self._special_lengths:
                token_id = self._special_by_text.get(text[start : start + length])
                if token_id is not None:
                    if start > plain_from:
                        yield text[plain_from:start]
                    yield token_id
                    plain_from = search_from = start + length
                    break
        if plain_from < len(text):
            yield text[plain_from:]

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Return the text of `ids`; bytes that are no UTF-8 become U+FFFD."""
        hidden = self.special_ids if skip_special else frozenset()
        data = b"".join(self.token_bytes(token_id) for token_id in ids if token_id not in hidden)
        return data.decode("utf-8", "replace")

    def least_tokens(self, text: str) -> int:
        """Return a number of tokens that `encode(text)` cannot stay below, without encoding it.

        Tells that a text does not fit a context in a hundredth of the time and memory of encoding.
        """
        return -(-len(text.encode("utf-8", "surrogatepass")) // self._longest_token_bytes)

    @functools.cached_property
    def _longest_token_bytes(self) -> int:
        # A token of the vocabulary has a character a byte; an added one, which is few, may not.
        longest = max(map(len, self._backend.get_vocab(with_added_tokens=False)), default=1)
        return max([longest, *map(len, self._added_bytes.values())])

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that `token_id` stands for, special tokens by their text.

        An id that the vocabulary leaves empty has none.
        """
        added = self._added_bytes.get(token_id)
        if added is not None:
            return added
        token = self._backend.id_to_token(token_id) or ""
        try:
            return bytes([BYTE_OF_CHARACTER[character] for character in token])
        except KeyError:  # an entry that no text becomes
            return token.encode()

    def id_to_token(self, token_id: int) -> str | None:
        """Return the vocabulary's name of `token_id`, None if it has none."""
        return self._backend.id_to_token(token_id)

    def token_to_id(self, token: str) -> int | None:
        """Return the id of the vocabulary's entry `token`, None if there is none."""
        return self._backend.token_to_id(token)

    def _encode_valid(self, text: str) -> list[int]:
        """Encode a text without surrogates."""
        if not text:
            return []
        try:
            ids = guarded(self._backend.encode, text, add_special_tokens=False).ids
        except PanicError as error:
            raise self._not_encoded(text, error) from None
        if not self.special_ids.isdisjoint(ids) or max(ids, default=0) >= self.vocab_size:
            raise RejectedError(
                f"{self._name}: maps plain text to a special id or to one beyond vocab_size "
                f"({self.vocab_size})"
            )
        if self._backend.decode(ids, skip_special_tokens=False) != text != self.decode(ids):
            raise RejectedError(
                f"{self._name}: changes or loses text that it encodes; Apertus tokenizers keep it"
            )
        return ids

    def _not_encoded(self, text: str, error: PanicError) -> RejectedError | UsageError:
        """Return whose fault it is that the tokenizer's pattern gave up on `text`.

        Patterns give up after some ten million steps. A sound one takes a few for a character.
        """
        size = len(text)
        if size < LONG_TEXT:
            return RejectedError(f"{self._name}: gives up on {size} characters ({error})")
        return UsageError(
            f"the tokenizer gives up on a text of {size} characters ({error}); shorten it, or "
            "break up its runs of blanks or letters"
        )

    def _byte_tokens(self, surrogate: str) -> list[int]:
        escaped = "\udc80" <= surrogate <= "\udcff"
        data = surrogate.encode("utf-8", "surrogateescape" if escaped else "surrogatepass")
        ids = [self._backend.token_to_id(CHARACTER_OF_BYTE[byte]) for byte in data]
        return [i for i in ids if i is not None]
