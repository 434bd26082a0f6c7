"""The vocabulary as a table: the ids of the tokenizers library, and the library where it fails."""

from __future__ import annotations

import json
import struct
from hashlib import sha256
from pathlib import Path
from zlib import crc32

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from apertus_mlx.system.user_folders import CACHE_VARIABLE
from apertus_mlx.text import vocabulary, vocabulary_file
from apertus_mlx.text.token_table import FILE_NAME, TableError, build_table, read_table
from apertus_mlx.text.tokenizer import Tokenizer
from apertus_mlx.text.vocabulary import LibraryVocabulary, TableVocabulary
from tests.chat_tokenizers import backend_json, special_names, vocab_size, write_tokenizer

_LIBRARY = tokenizers.Tokenizer.from_str(backend_json("v1"))
_LIBRARY.encode_special_tokens = True
_DATA = backend_json("v1").encode()
_DIGEST = sha256(_DATA).digest()


def table_vocabulary(source: str) -> TableVocabulary:
    data = source.encode()
    table = read_table(build_table(data, json.loads(data)), sha256(data).digest())
    vocabulary = TableVocabulary(table, lambda: tokenizers.Tokenizer.from_str(source))
    vocabulary.cutter.encode_special_tokens = True
    return vocabulary


_TABLE = table_vocabulary(backend_json("v1"))
_WORDS = ["the", " the", "Hello", " world", "capital", "\\begin{ x", "<s>", "é", " ", "\n", "12"]


def library_ids(text: str) -> list[int]:
    return list(_LIBRARY.encode(text, add_special_tokens=False).ids)


@given(st.text())
def test_any_text_has_the_librarys_ids(text: str) -> None:
    ids = _TABLE.encode(text)
    assert ids == library_ids(text)
    assert _TABLE.keeps(ids, text)


@given(st.lists(st.sampled_from([*_WORDS, *special_names("v1")])))
def test_words_and_control_texts_have_the_librarys_ids(words: list[str]) -> None:
    text = "".join(words)
    assert _TABLE.encode(text) == library_ids(text)


@pytest.mark.parametrize("ignore_merges", [False, True])
def test_merges_by_rank_whether_or_not_whole_pieces_are_taken(ignore_merges: bool) -> None:
    source = json.loads(backend_json("v1"))
    source["model"]["ignore_merges"] = ignore_merges
    # A later rule that overlaps an earlier one, and a whole word that no rule builds.
    vocab = source["model"]["vocab"]
    for name in ("ab", "bc", "abc", "aa", "whole"):
        vocab[name] = max(vocab.values()) + 2
    source["model"]["merges"] += [["b", "c"], ["a", "b"], ["a", "bc"], ["a", "a"]]
    text = json.dumps(source)
    library = tokenizers.Tokenizer.from_str(text)
    table = table_vocabulary(text)
    for given_text in ("abc", "aabc", "abab", "aaaaa", "whole", "wholeabc", "bcbcabc"):
        expected = library.encode(given_text, add_special_tokens=False).ids
        assert table.encode(given_text) == expected, given_text


def test_tokens_names_and_sizes_are_the_librarys() -> None:
    library = LibraryVocabulary(_LIBRARY)
    assert _TABLE.added == library.added
    assert (_TABLE.size, _TABLE.longest_token_bytes) == (library.size, library.longest_token_bytes)
    for token_id in range(library.size + 2):
        assert _TABLE.token_bytes(token_id) == library.token_bytes(token_id)
        assert _TABLE.name(token_id) == library.name(token_id)
    for name in ("the", "Ġthe", "<s>", "\\begin{ x", "nothing", "ünknown ", ""):
        assert _TABLE.find(name) == library.find(name), name


def test_long_texts_and_pieces_go_to_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "LONG_TEXT", 50)
    monkeypatch.setattr(vocabulary, "LONG_PIECE", 10)
    for text in ("the world " * 9, "a" * 30):
        assert _TABLE.encode(text) == library_ids(text)


_GOOD = build_table(_DATA, json.loads(_DATA))


@given(st.integers(0, len(_GOOD) - 1), st.integers(1, 255), st.integers(0, 40))
def test_a_damaged_table_is_refused(at: int, difference: int, cut: int) -> None:
    table = bytearray(_GOOD)
    table[at] ^= difference
    with pytest.raises(TableError):
        read_table(bytes(table[: len(table) - cut]), _DIGEST)


@given(st.integers(48, len(_GOOD) - 1), st.integers(0, 255), st.integers(0, 40))
def test_a_forged_table_is_refused_or_stays_inside(at: int, byte: int, cut: int) -> None:
    table = bytearray(_GOOD[: len(_GOOD) - cut])
    table[min(at, len(table) - 1)] = byte
    table[40:44] = struct.pack("<I", crc32(table[44:]))
    try:
        opened = TableVocabulary(read_table(bytes(table), _DIGEST), lambda: _LIBRARY)
    except TableError:
        return
    ids = opened.encode("the world is 12")
    assert all(0 <= token_id < opened.size for token_id in ids)


def test_a_forged_control_token_without_text_is_refused() -> None:
    """Texts are searched for control tokens by their first character."""
    source = json.loads(_DATA)
    source["added_tokens"].append({**source["added_tokens"][0], "id": 900, "content": ""})
    with pytest.raises(TableError, match="without text"):
        read_table(build_table(_DATA, source), _DIGEST)


def test_a_table_is_that_of_one_file() -> None:
    with pytest.raises(TableError, match="another tokenizer"):
        read_table(_GOOD, bytes(32))


@pytest.mark.parametrize("place", ["folder", "cache"])
@pytest.mark.parametrize("state", ["whole", "damaged", "of another file", "a folder"])
def test_whatever_stands_there_the_ids_are_the_librarys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, state: str
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    folder = write_tokenizer(tmp_path / "model")
    data = (folder / "tokenizer.json").read_bytes()
    cached = tmp_path / "cache" / "tokenizers" / f"{sha256(data).hexdigest()[:32]}.bin"
    path = folder / FILE_NAME if place == "folder" else cached
    path.parent.mkdir(parents=True, exist_ok=True)
    table = build_table(data, json.loads(data))
    if state == "a folder":
        path.mkdir()
    elif state == "of another file":
        path.write_bytes(build_table(data + b" ", json.loads(data)))
    else:
        path.write_bytes(table if state == "whole" else table[:-9])
    tokenizer = Tokenizer.load(folder, vocab_size=vocab_size(), bos_token_id=1)
    found = type(tokenizer._vocabulary)
    assert found is (TableVocabulary if state == "whole" else LibraryVocabulary)
    assert tokenizer.encode("Hello the world") == library_ids("Hello the world")


def test_the_first_to_read_a_large_file_leaves_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(vocabulary_file, "LARGE_FILE_BYTES", 0)
    folder = write_tokenizer(tmp_path / "model")
    kinds = [
        type(Tokenizer.load(folder, vocab_size=vocab_size(), bos_token_id=1)._vocabulary)
        for _ in range(2)
    ]
    assert kinds == [LibraryVocabulary, TableVocabulary]
    assert len(list((tmp_path / "cache" / "tokenizers").iterdir())) == 1


def test_a_cache_that_cannot_be_written_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(vocabulary_file, "LARGE_FILE_BYTES", 0)
    # Each start would wait for a table that it throws away.
    monkeypatch.setattr(vocabulary_file, "make_table", lambda *_: pytest.fail("makes a table"))
    folder = write_tokenizer(tmp_path / "model")
    tokenizer = Tokenizer.load(folder, vocab_size=vocab_size(), bos_token_id=1)
    assert tokenizer.encode("Hello") == library_ids("Hello")


def test_a_user_without_a_home_needs_no_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container whose user no file of users knows."""

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    for variable in (CACHE_VARIABLE, "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(vocabulary_file, "LARGE_FILE_BYTES", 0)
    folder = write_tokenizer(tmp_path / "model")
    tokenizer = Tokenizer.load(folder, vocab_size=vocab_size(), bos_token_id=1)
    assert tokenizer.encode("Hello") == library_ids("Hello")
