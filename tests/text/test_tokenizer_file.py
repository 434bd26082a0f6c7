"""What tokenizer.json may ask for: honoured as the library does, switched off, or refused."""

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
from apertus_mlx.text.tokenizer import Tokenizer
from tests.chat_tokenizers import backend_json, special_tokens, vocab_size

TEXT = "Hello world, the capital of Zürich\n\n  is disabled 1234 日本"
SPLIT = {"type": "Split", "pattern": {"Regex": r"\s"}, "behavior": "Isolated", "invert": False}


def changed(change: Callable[[Any], None]) -> str:
    value = json.loads(backend_json("v1"))
    change(value)
    return json.dumps(value)


def load(directory: Path, text: str) -> Tokenizer:
    (directory / "tokenizer.json").write_text(text, encoding="utf-8")
    return Tokenizer.load(directory, vocab_size=vocab_size() + 9, bos_token_id=1)


def setting(*path: str, to: object) -> Callable[[Any], None]:
    def change(value: Any) -> None:
        for key in path[:-1]:
            value = value[key]
        value[path[-1]] = to

    return change


@pytest.mark.parametrize("dropout", [0.1, 1.0])
def test_dropout_of_merges_is_off(tmp_path: Path, dropout: float) -> None:
    trained = changed(setting("model", "dropout", to=dropout))
    random = tokenizers.Tokenizer.from_str(changed(setting("model", "ignore_merges", to=False)))
    random.model.dropout = dropout
    wanted = tokenizers.Tokenizer.from_str(backend_json("v1"))
    tokenizer = load(tmp_path, trained)
    for text in (TEXT, "Hello the capital " * 50):
        assert random.encode(text).ids != wanted.encode(text).ids
        for _ in range(5):
            assert tokenizer.encode(text) == wanted.encode(text, add_special_tokens=False).ids


HONOURED: dict[str, Callable[[Any], None]] = {
    "unknown": setting("model", "unk_token", to="<unk>"),
    "unknown, fused": lambda v: v["model"].update(unk_token="<unk>", fuse_unk=True),
    "byte fallback": setting("model", "byte_fallback", to=True),
    "merges": setting("model", "ignore_merges", to=False),
    "no prefix": setting("model", "continuing_subword_prefix", to=""),
    "no suffix": setting("model", "end_of_word_suffix", to=""),
    "offsets": setting("pre_tokenizer", "trim_offsets", to=False),
    "one word": setting("pre_tokenizer", "use_regex", to=False),
    "pattern": lambda v: v.update(
        pre_tokenizer={"type": "Sequence", "pretokenizers": [SPLIT, v["pre_tokenizer"]]}
    ),
    "digits": lambda v: v.update(
        pre_tokenizer={
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, v["pre_tokenizer"]],
        }
    ),
    "no post-processor": setting("post_processor", to=None),
    "byte-level post-processor": lambda v: v.update(
        post_processor={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True,
                        "use_regex": True}
    ),
    "added text": lambda v: v["added_tokens"].append(
        {"id": vocab_size(), "content": "capital of", "single_word": False, "lstrip": False,
         "rstrip": False, "normalized": True, "special": False}
    ),
    "added text with a letter of the byte alphabet": lambda v: v["added_tokens"].append(
        {"id": vocab_size(), "content": "Zürich", "single_word": False, "lstrip": False,
         "rstrip": False, "normalized": False, "special": False}
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HONOURED)
def test_what_keeps_texts_is_done_as_the_library_does_it(tmp_path: Path, name: str) -> None:
    data = changed(HONOURED[name])
    library = tokenizers.Tokenizer.from_str(data)
    tokenizer = load(tmp_path, data)
    for text in (TEXT, "\x00 ~ 🏔️🏔️ é", "", " ", "a" * 3000, TEXT * 20):
        ids = tokenizer.encode(text)
        assert ids == library.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == text


REFUSED: dict[str, Callable[[Any], None]] = {
    **{
        f"normalizer {value['type']}": setting("normalizer", to=value)
        for value in (
            {"type": "NFC"},
            {"type": "NFKC"},
            {"type": "Lowercase"},
            {"type": "Strip", "strip_left": True, "strip_right": True},
            {"type": "StripAccents"},
            {"type": "Prepend", "prepend": "_"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "_"},
            {"type": "Sequence", "normalizers": [{"type": "NFD"}]},
        )
    },
    "subword prefix": setting("model", "continuing_subword_prefix", to="##"),
    "word suffix": setting("model", "end_of_word_suffix", to="</w>"),
    "a byte without token": lambda v: v["model"]["vocab"].pop(CHARACTER_OF_BYTE[0xF3]),
    "a blank in front": setting("pre_tokenizer", "add_prefix_space", to=True),
    "no pre-tokenizer": setting("pre_tokenizer", to=None),
    "blanks dropped": setting("pre_tokenizer", to={"type": "WhitespaceSplit"}),
    "blanks replaced": setting(
        "pre_tokenizer", to={"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always",
                             "split": True}
    ),
    "pieces removed": lambda v: v.update(
        pre_tokenizer={
            "type": "Sequence",
            "pretokenizers": [SPLIT | {"behavior": "Removed"}, v["pre_tokenizer"]],
        }
    ),
    "text eaten by an added token": lambda v: v["added_tokens"].append(
        {"id": vocab_size(), "content": "of", "single_word": False, "lstrip": True,
         "rstrip": False, "normalized": False, "special": False}
    ),
    "other decoder": setting("decoder", to={"type": "Metaspace", "replacement": "▁",
                                            "prepend_scheme": "always", "split": True}),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_changes_or_loses_texts_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(RejectedError, match=r"tokenizer\.json: ") as caught:
        load(tmp_path, changed(REFUSED[name]))
    assert "\n" not in str(caught.value)


def test_a_pattern_that_loses_rare_text_is_refused_where_it_does(tmp_path: Path) -> None:
    loses = SPLIT | {"pattern": {"Regex": "q"}, "behavior": "Removed"}
    tokenizer = load(
        tmp_path,
        changed(
            lambda v: v.update(
                pre_tokenizer={"type": "Sequence", "pretokenizers": [loses, v["pre_tokenizer"]]}
            )
        ),
    )
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    with pytest.raises(RejectedError, match="changes or loses text"):
        tokenizer.encode("a quick one")


@given(text=st.text(max_size=50))
def test_no_text_takes_fewer_tokens_than_the_least(text: str) -> None:
    tokenizer = _SHARED[0]
    assert tokenizer.least_tokens(text) <= len(tokenizer.encode(text))


def test_the_least_count_of_tokens_is_sharp_and_needs_no_encoding(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer = _SHARED[0]
    assert tokenizer.least_tokens("") == 0
    assert tokenizer.least_tokens("<|developer_start|>") == 1
    monkeypatch.setattr(Tokenizer, "encode", None)
    monkeypatch.setattr(Tokenizer, "_encode_valid", None)
    longest = max(len(text) for text in special_tokens(tokenizer))
    assert tokenizer.least_tokens("x" * 10_000_000) == -(-10_000_000 // longest)
    assert tokenizer.least_tokens("\udcff" * longest) == 3


_SHARED: list[Tokenizer] = []


@pytest.fixture(autouse=True, scope="module")
def _shared(tmp_path_factory: pytest.TempPathFactory) -> None:
    _SHARED[:] = [load(Path(tmp_path_factory.mktemp("tokenizer")), backend_json("v1"))]
