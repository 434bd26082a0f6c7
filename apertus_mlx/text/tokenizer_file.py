"""`tokenizer.json` as a backend that encodes a text always the same way.

The file may ask for what a prompt must not get. What can only be a leftover of training is
switched off: cutting, padding, BPE dropout. Parts made to change or lose text are refused.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import tokenizers

from apertus_mlx.errors import RejectedError
from apertus_mlx.system.model_files import MAX_TOKENIZER_BYTES, read_file
from apertus_mlx.system.rust_panics import guarded
from apertus_mlx.text.byte_alphabet import CHARACTER_OF_BYTE

_ADDED_TOKENS = re.compile(r'"added_tokens"\s*:\s*(?=\[)')


def is_control_text(text: str) -> bool:
    r"""Return whether an added token's text is one of structure: `<…>` or `[…]`.

    Some files of Apertus flag all of the first thousand ids as special, among them `\begin{`,
    `\end{`, `\text{` and `\boxed{`. The models write these in formulas as any other word, so they
    are text here whatever the flag says.
    """
    return len(text) > 2 and text[0] + text[-1] in ("<>", "[]")


def read_tokenizer_file(path: Path) -> bytes:
    """The bytes of the tokenizer file `path`.

    Raises:
        RejectedError: it is missing, too large, or begins with a byte order mark.
    """
    data = read_file(path, MAX_TOKENIZER_BYTES)
    if data.startswith(b"\xef\xbb\xbf"):
        raise RejectedError(f"{path}: starts with a byte order mark; save it as plain UTF-8")
    return data


def parse_backend(path: Path, data: bytes) -> tokenizers.Tokenizer:
    """Make a backend of the bytes of the tokenizer file `path`; control text in a text stays text.

    Raises:
        RejectedError: the file is damaged, no byte-level BPE, or changes texts.
    """
    try:
        backend = guarded(tokenizers.Tokenizer.from_buffer, with_text_unflagged(data))
    except MemoryError:
        raise
    except Exception as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise RejectedError(f"{path}: is not a tokenizer file ({reason})") from None
    check_backend(path, backend)
    return backend


def check_backend(path: Path, backend: tokenizers.Tokenizer) -> None:
    """Refuse a backend that changes texts; switch off what is a leftover of training.

    Raises:
        RejectedError: it is no byte-level BPE, or changes texts.
    """
    _check_parts(path, backend)
    _check_added_tokens(path, backend)
    backend.no_truncation()
    backend.no_padding()
    backend.model.dropout = None
    backend.encode_special_tokens = True


def with_text_unflagged(data: bytes) -> bytes:
    """Return the file with the flag `special` taken from each added token that is text.

    Only the list of added tokens is parsed, a thousandth of the file. A file that is no JSON is
    left as it is, for the library to say so.
    """
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return data
    parts: list[str] = []
    position = 0
    for match in _ADDED_TOKENS.finditer(text):
        try:
            tokens, end = json.JSONDecoder().raw_decode(text, match.end())
        except (ValueError, RecursionError):
            return data
        flagged = [
            token
            for token in tokens
            if isinstance(token, dict)
            and token.get("special") is True
            and isinstance(token.get("content"), str)
            and not is_control_text(token["content"])
        ]
        for token in flagged:
            token["special"] = False
        if flagged:
            parts += [text[position : match.end()], json.dumps(tokens)]
            position = end
    return "".join([*parts, text[position:]]).encode() if parts else data


def _check_parts(path: Path, backend: tokenizers.Tokenizer) -> None:
    """Refuse other algorithms, and parts that byte-level BPE has no use for but to change texts."""
    for part, found, wanted in (
        ("model", backend.model, tokenizers.models.BPE),
        ("decoder", backend.decoder, tokenizers.decoders.ByteLevel),
    ):
        if not isinstance(found, wanted):
            raise RejectedError(
                f"{path}: {part} is {type(found).__name__}, expected {wanted.__name__}; "
                "Apertus tokenizers are byte-level BPE"
            )
    changing = {
        "normalizer": backend.normalizer and type(backend.normalizer).__name__,
        "continuing_subword_prefix": backend.model.continuing_subword_prefix,
        "end_of_word_suffix": backend.model.end_of_word_suffix,
    }
    for part, value in changing.items():
        if value:
            raise RejectedError(
                f"{path}: {part} is {value!r}, which changes texts; Apertus tokenizers have none"
            )
    missing = [
        byte
        for byte, character in CHARACTER_OF_BYTE.items()
        if backend.model.token_to_id(character) is None
    ]
    if missing:
        raise RejectedError(f"{path}: has no token for byte {missing[0]:#04x}, so it loses text")


def _check_added_tokens(path: Path, backend: tokenizers.Tokenizer) -> None:
    for token_id, token in backend.get_added_tokens_decoder().items():
        if token.lstrip or token.rstrip or token.single_word:
            raise RejectedError(
                f"{path}: added token {token_id} ({token.content!r}) sets lstrip, rstrip or "
                "single_word, which loses text"
            )
        if token.special and not is_control_text(token.content):
            raise RejectedError(
                f"{path}: added token {token_id} ({token.content!r}) is flagged special, which "
                "only <…> and […] can be, and added_tokens stands in a form in which that cannot "
                "be mended; save the file again with the tokenizers library"
            )
