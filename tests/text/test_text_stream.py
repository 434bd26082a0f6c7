"""Streaming text: certain characters only, stop strings anywhere, nothing a terminal obeys."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apertus_mlx.errors import UsageError
from apertus_mlx.text.byte_alphabet import CHARACTER_OF_BYTE
from apertus_mlx.text.stream import TextStream
from apertus_mlx.text.tokenizer import Tokenizer
from tests.chat_tokenizers import load_tokenizer

FAMILY = "👩‍👩‍👧‍👦"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(Path(tmp_path_factory.mktemp("tokenizer")))


_TOKENIZER: list[Tokenizer] = []


@pytest.fixture(autouse=True, scope="module")
def _shared(tokenizer: Tokenizer) -> None:
    _TOKENIZER[:] = [tokenizer]


def ids_of_bytes(tokenizer: Tokenizer, data: bytes) -> list[int]:
    ids = [tokenizer.token_to_id(CHARACTER_OF_BYTE[byte]) for byte in data]
    assert None not in ids
    return [i for i in ids if i is not None]


def stream(tokenizer: Tokenizer, ids: list[int], stops: list[str] | None = None) -> list[str]:
    text = TextStream(tokenizer, stops or [])
    return [*(text.push(i) for i in ids), text.finish()]


@pytest.mark.parametrize("text", ["Zürich", FAMILY, "مرحبا بالعالم", "日本語", "a\u0301"])
def test_characters_appear_whole_when_their_bytes_come_one_by_one(
    tokenizer: Tokenizer, text: str
) -> None:
    pieces = stream(tokenizer, ids_of_bytes(tokenizer, text.encode()))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert [piece for piece in pieces if piece] == list(text)


def test_invalid_bytes_become_replacement_characters_once_they_are_certain(
    tokenizer: Tokenizer,
) -> None:
    text = TextStream(tokenizer)
    first, second, letter = ids_of_bytes(tokenizer, b"\xe2\x82a")
    assert (text.push(first), text.push(second)) == ("", "")
    assert text.push(letter) == "\ufffda"
    assert text.push(first) == ""
    assert text.finish() == "\ufffd"


def test_special_tokens_are_hidden(tokenizer: Tokenizer) -> None:
    ids = [67, *tokenizer.encode("Hi"), 68]
    assert "".join(stream(tokenizer, ids)) == "Hi"


def test_added_token_that_is_not_special_is_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a\\begin{ xb")
    assert tokenizer.token_to_id("\\begin{ x") in ids
    assert "".join(stream(tokenizer, ids)) == "a\\begin{ xb"


@given(data=st.lists(st.integers(0, 400)))
def test_stream_equals_decoding_everything(data: list[int]) -> None:
    """Any ids, so any bytes: the tokenizers library's lossy decoding is the reference."""
    tokenizer = _TOKENIZER[0]
    ids = [i for i in data if i < tokenizer.vocab_size]
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


def reference_cut(text: str, stops: list[str]) -> str:
    """The text before the longest of the stop strings that are complete first."""
    for end in range(1, len(text) + 1):
        lengths = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if lengths:
            return text[: end - max(lengths)]
    return text


@given(
    text=st.text(alphabet="abcé\n", max_size=40),
    stops=st.lists(st.text(alphabet="abcé\n", min_size=1, max_size=5), max_size=6),
)
def test_stop_law(text: str, stops: list[str]) -> None:
    tokenizer = _TOKENIZER[0]
    ids = ids_of_bytes(tokenizer, text.encode())
    pieces = stream(tokenizer, ids, stops)
    assert "".join(pieces) == reference_cut(text, stops)
    shown = ""
    for token_count, piece in enumerate(pieces[:-1], start=1):
        shown += piece
        # What is shown is what no continuation can take back, and all of it.
        known = text.encode()[
            : b"".join(text.encode()[i : i + 1] for i in range(token_count)).__len__()
        ]
        certain = known.decode("utf-8", "ignore")
        if reference_cut(certain, stops) != certain:
            break
        held = max(
            (n for stop in stops for n in range(len(stop)) if certain.endswith(stop[:n])),
            default=0,
        )
        assert shown == certain[: len(certain) - held]


def test_stop_string_across_tokens_inside_a_token_and_many_of_them(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("Hello world the end")
    assert "".join(stream(tokenizer, ids, ["lo wo"])) == "Hel"
    assert "".join(stream(tokenizer, ids, ["ell"])) == "H"
    many = [f"stop{i}" for i in range(1000)] + ["the"]
    assert "".join(stream(tokenizer, ids, many)) == "Hello world "


def test_stop_string_that_begins_with_a_split_character(tokenizer: Tokenizer) -> None:
    ids = ids_of_bytes(tokenizer, "a→b→c".encode())
    assert "".join(stream(tokenizer, ids, ["→c"])) == "a→b"


def test_after_the_stop_nothing_more_appears(tokenizer: Tokenizer) -> None:
    text = TextStream(tokenizer, ["b"])
    pieces = [text.push(i) for i in tokenizer.encode("abab")]
    assert text.stopped
    assert [*pieces, text.finish()] == ["a", *[""] * len(pieces)]


def test_empty_stop_string_is_a_usage_error(tokenizer: Tokenizer) -> None:
    with pytest.raises(UsageError, match="stop string"):
        TextStream(tokenizer, ["x", ""])
