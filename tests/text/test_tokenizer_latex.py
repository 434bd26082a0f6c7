"""LaTeX openers that a file flags special: text in every direction, as where it does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from apertus_mlx.errors import RejectedError
from apertus_mlx.text.stream import TextStream
from apertus_mlx.text.template import ChatTemplate
from apertus_mlx.text.tokenizer import Tokenizer
from tests.chat_tokenizers import backend_json, encode_with_control, special_tokens, vocab_size

LATEX = {14: "\\begin{", 15: "\\end{", 16: "\\text{", 17: "\\boxed{"}
TEXT = "So $\\boxed{\\text{ok}}$ and \\begin{x}y\\end{x}<s>[INST] \\boxed{"


def with_latex(special: bool) -> str:
    """A tokenizer whose ids 14 to 17 are LaTeX openers, flagged as told; 4 is `[INST]`."""
    value: Any = json.loads(backend_json("v1"))
    for token_id, name in {**LATEX, 4: "[INST]"}.items():
        entry = value["added_tokens"][token_id]
        del value["model"]["vocab"][entry["content"]]
        value["model"]["vocab"][name] = token_id
        entry.update(content=name, special=special or token_id == 4)
    return json.dumps(value)


@pytest.fixture(scope="module")
def library() -> tokenizers.Tokenizer:
    """The library on a file that does not flag them, with control text kept as text."""
    backend = tokenizers.Tokenizer.from_str(with_latex(special=False))
    backend.encode_special_tokens = True
    return backend


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = Path(tmp_path_factory.mktemp("latex"))
    (directory / "tokenizer.json").write_text(with_latex(special=True), encoding="utf-8")
    return Tokenizer.load(directory, vocab_size=vocab_size(), bos_token_id=1)


def test_encoding(tokenizer: Tokenizer, library: tokenizers.Tokenizer) -> None:
    ids = tokenizer.encode(TEXT)
    assert ids == library.encode(TEXT, add_special_tokens=False).ids
    assert [i for i in ids if i < 74] == [17, 16, 14, 15, 17]
    trusted = encode_with_control(tokenizer, TEXT)
    library.encode_special_tokens = False
    assert trusted == library.encode(TEXT, add_special_tokens=False).ids
    library.encode_special_tokens = True
    assert [i for i in trusted if i < 74] == [17, 16, 14, 15, 1, 4, 17]


def test_decoding_and_streaming(tokenizer: Tokenizer, library: tokenizers.Tokenizer) -> None:
    ids = [65, *library.encode(TEXT, add_special_tokens=False).ids, 66]
    assert library.decode(ids) == TEXT
    assert tokenizer.decode(ids) == TEXT
    stream = TextStream(tokenizer)
    assert "".join([*map(stream.push, ids), stream.finish()]) == TEXT


@pytest.mark.parametrize("stop", ["\\boxed{", "oxed{\\te", "ed{", "{x"])
def test_stop_strings(tokenizer: Tokenizer, library: tokenizers.Tokenizer, stop: str) -> None:
    stream = TextStream(tokenizer, [stop])
    ids = library.encode(TEXT, add_special_tokens=False).ids
    text = "".join([*map(stream.push, ids), stream.finish()])
    assert text == TEXT[: TEXT.index(stop)]


def test_templates_write_and_see_them_as_text(tokenizer: Tokenizer) -> None:
    source = "{{ bos_token }}\\boxed{ {{ '\\\\boxed{' == messages[0].content[:7] }}"
    source += "{{ '\\\\text{' | length }}<|user_start|>{{ messages[0].content }}"
    template = ChatTemplate(source, tokenizer, name="t")
    text = "\\boxed{42}"
    ids = template.render([{"role": "user", "content": text}])
    assert ids == [1, *tokenizer.encode("\\boxed{ True6"), 65, *tokenizer.encode(text)]
    assert ids.count(17) == 2


def test_names_and_ids_are_those_of_the_file(tokenizer: Tokenizer) -> None:
    for token_id, name in LATEX.items():
        assert tokenizer.id_to_token(token_id) == name
        assert tokenizer.token_to_id(name) == token_id
        assert tokenizer.token_bytes(token_id) == name.encode()
        assert token_id not in tokenizer.special_ids
    assert not set(special_tokens(tokenizer)) & set(LATEX.values())
    assert 4 in tokenizer.special_ids


@pytest.mark.parametrize("name", ["<", "user:", "|user|", "[user", "<user]"])
def test_control_tokens_have_names_of_structure(tmp_path: Path, name: str) -> None:
    value: Any = json.loads(backend_json("v1"))
    value["added_tokens"][65]["content"] = name
    value["model"]["vocab"][name] = value["model"]["vocab"].pop("<|user_start|>")
    (tmp_path / "tokenizer.json").write_text(json.dumps(value), encoding="utf-8")
    with pytest.raises(RejectedError, match=r"id 65 .*is not a special token"):
        Tokenizer.load(tmp_path, vocab_size=vocab_size(), bos_token_id=1)


@pytest.mark.parametrize("place", ["before", "after"])
def test_a_second_list_of_added_tokens_changes_nothing(tmp_path: Path, place: str) -> None:
    flagged = with_latex(special=True)
    second = '"added_tokens": ' + json.dumps(json.loads(flagged)["added_tokens"])
    data = (
        flagged.replace("{", "{" + second + ",", 1)
        if place == "before"
        else flagged[:-1] + "," + second + "}"
    )
    (tmp_path / "tokenizer.json").write_text(data, encoding="utf-8")
    try:
        tokenizer = Tokenizer.load(tmp_path, vocab_size=vocab_size(), bos_token_id=1)
    except RejectedError:
        return
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert 17 not in tokenizer.special_ids


def test_a_flag_that_is_found_too_late_names_the_token_and_the_way_out(tmp_path: Path) -> None:
    data = with_latex(special=True).replace('"added_tokens"', '"added\\u005ftokens"')
    (tmp_path / "tokenizer.json").write_text(data, encoding="utf-8")
    with pytest.raises(RejectedError, match=r"token 14 \(.*begin\{.*save the file again"):
        Tokenizer.load(tmp_path, vocab_size=vocab_size(), bos_token_id=1)
