"""The tokenizer: faithful to the tokenizers library, closed to control text, strict at load."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from apertus_mlx.errors import RejectedError
from apertus_mlx.text.byte_alphabet import CHARACTER_OF_BYTE
from apertus_mlx.text.roles import CONTROL_IDS, Role
from apertus_mlx.text.tokenizer import Tokenizer
from tests.chat_tokenizers import (
    backend_json,
    encode_with_control,
    load_tokenizer,
    special_names,
    vocab_size,
    write_tokenizer,
)

_TOKENIZER: list[Tokenizer] = []
SPECIAL_TEXT = "<s><|assistant_start|>hi<|user_end|></s> <SPECIAL_10>"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(Path(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(autouse=True, scope="module")
def _shared(tokenizer: Tokenizer) -> None:
    _TOKENIZER[:] = [tokenizer]


def load(directory: Path, size: int | None = None, bos: int | None = 1) -> Tokenizer:
    return Tokenizer.load(
        directory, vocab_size=vocab_size() if size is None else size, bos_token_id=bos
    )


@pytest.mark.parametrize("version", ["v1", "v1.1"])
def test_roles_are_known_by_id(tmp_path: Path, version: str) -> None:
    tokenizer = load_tokenizer(tmp_path, version)
    assert (Role.SYSTEM.start, Role.SYSTEM.end) == (61, 62)
    assert (Role.DEVELOPER.start, Role.DEVELOPER.end) == (63, 64)
    assert (Role.USER.start, Role.USER.end) == (65, 66)
    assert (Role.ASSISTANT.start, Role.ASSISTANT.end) == (67, 68)
    assert (Role.INNER.start, Role.INNER.end) == (69, 70)
    assert (Role.TOOLS.start, Role.TOOLS.end) == (71, 72)
    assert [tokenizer.id_to_token(i) for i in CONTROL_IDS] == special_names(version)[61:73]


@given(text=st.text())
def test_plain_text_round_trips_and_matches_the_library(text: str) -> None:
    tokenizer = _TOKENIZER[0]
    backend = tokenizers.Tokenizer.from_str(backend_json("v1"))
    ids = tokenizer.encode(text)
    assert ids == backend.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == text


@given(parts=st.lists(st.sampled_from([*special_names("v1"), "<", "|>", "a", " ", "<|", "é"])))
def test_control_text_in_plain_text_never_becomes_control(parts: list[str]) -> None:
    tokenizer = _TOKENIZER[0]
    text = "".join(parts)
    ids = tokenizer.encode(text)
    assert tokenizer.special_ids.isdisjoint(ids)
    assert tokenizer.decode(ids) == text
    backend = tokenizers.Tokenizer.from_str(backend_json("v1"))
    trusted = encode_with_control(tokenizer, text)
    assert trusted == backend.encode(text, add_special_tokens=False).ids


def test_no_bos_is_added(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("") == []
    assert encode_with_control(tokenizer, "<s>Hello")[0] == 1
    assert 1 not in encode_with_control(tokenizer, "Hello")


def test_special_tokens_are_decoded_only_if_asked_for(tokenizer: Tokenizer) -> None:
    ids = encode_with_control(tokenizer, SPECIAL_TEXT)
    assert tokenizer.decode(ids) == "hi "
    assert tokenizer.decode(ids, skip_special=False) == SPECIAL_TEXT


def test_odd_text_is_kept_byte_for_byte(tokenizer: Tokenizer) -> None:
    for text in ["\x00", "a\r\nb", "\ufdd0\ufdd1\uffff", " ", "\n\n"]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    data = b"caf\xe9 \xff\xfe ok"
    ids = tokenizer.encode(data.decode("utf-8", "surrogateescape"))
    assert b"".join(map(tokenizer.token_bytes, ids)) == data
    ids = tokenizer.encode("a\ud800b")
    assert b"".join(map(tokenizer.token_bytes, ids)) == b"a\xed\xa0\x80b"


def test_ten_megabytes_are_encoded(tokenizer: Tokenizer) -> None:
    text = "Hello world the capital\n" * 20_000
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_padding_truncation_and_post_processor_of_the_file_are_ignored(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert load(tmp_path).encode("Hello world") == load_tokenizer(tmp_path).encode("Hello world")


def rewritten(change: Callable[[Any], None]) -> bytes:
    value = json.loads(backend_json("v1"))
    change(value)
    return json.dumps(value).encode()


def _unmark_control(value: Any) -> None:
    value["added_tokens"][65]["special"] = False


def _strip(value: Any) -> None:
    value["added_tokens"][66]["rstrip"] = True


def _byte_fallback_decoder(value: Any) -> None:
    value["decoder"] = {"type": "ByteFallback"}


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "is not a tokenizer file"),
        (b"{}", "is not a tokenizer file"),
        (b"[1, 2", "is not a tokenizer file"),
        (b"\xff\xfe\x00", "is not a tokenizer file"),
        (backend_json("v1")[:-200].encode(), "is not a tokenizer file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "Git LFS pointer"),
        (b"\xef\xbb\xbf" + backend_json("v1").encode(), "byte order mark"),
        (rewritten(_unmark_control), "id 65 .*is not a special token"),
        (rewritten(_strip), "added token 66"),
        (rewritten(_byte_fallback_decoder), "decoder is ByteFallback, expected ByteLevel"),
    ],
)
def test_damaged_file_is_refused_in_one_line(tmp_path: Path, data: bytes, says: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes(data)
    with pytest.raises(RejectedError, match=says) as caught:
        load(tmp_path)
    assert "tokenizer.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file_and_directory_in_its_place(tmp_path: Path) -> None:
    with pytest.raises(RejectedError, match=r"tokenizer\.json: is missing"):
        load(tmp_path)
    (tmp_path / "tokenizer.json").mkdir()
    with pytest.raises(RejectedError, match=r"tokenizer\.json"):
        load(tmp_path)


def test_vocabulary_larger_than_the_model_is_refused_with_the_numbers(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    size = vocab_size()
    with pytest.raises(RejectedError, match=f"up to {size - 1}, but vocab_size .* is {size - 1}"):
        load(tmp_path, size - 1)
    assert load(tmp_path, size + 100).id_to_token(size + 50) is None


@pytest.mark.parametrize("bos", [-1, 10**9, 100])
def test_bos_that_is_no_special_token_is_refused(tmp_path: Path, bos: int) -> None:
    write_tokenizer(tmp_path)
    with pytest.raises(RejectedError, match=f"bos_token_id {bos}"):
        load(tmp_path, bos=bos)


def test_byte_alphabet_is_the_library_s() -> None:
    assert sorted(CHARACTER_OF_BYTE.values()) == sorted(
        tokenizers.pre_tokenizers.ByteLevel.alphabet()
    )
