"""Panics of a Rust library: one line, for the file's fault or the prompt's, on a quiet screen."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from chat_tokenizers import backend_json, vocab_size

from apertus_mlx.errors import ApertusError, RejectedError, UsageError
from apertus_mlx.rust_panics import PanicError, guarded
from apertus_mlx.tokenizer import Tokenizer


def load(directory: Path, pattern: str) -> Tokenizer:
    value: Any = json.loads(backend_json("v1"))
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    value["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [{**split, "invert": False}, value["pre_tokenizer"]],
    }
    (directory / "tokenizer.json").write_text(json.dumps(value), encoding="utf-8")
    return Tokenizer.load(directory, vocab_size=vocab_size(), bos_token_id=1)


@pytest.mark.parametrize(
    ("text", "error"),
    [("a" * 40 + "!", RejectedError), ("a" * 100_000 + "!", UsageError)],
    ids=["a text that any tokenizer takes", "a text that is too uniform"],
)
def test_a_pattern_that_gives_up(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], text: str, error: type[ApertusError]
) -> None:
    tokenizer = load(tmp_path, "(a+)+b")
    with pytest.raises(error, match="retry-limit") as caught:
        tokenizer.encode(text)
    assert "\n" not in str(caught.value)
    assert str(len(text)) in str(caught.value)
    assert capfd.readouterr() == ("", "")
    assert tokenizer.decode(tokenizer.encode("still well")) == "still well"


def test_a_pattern_that_gives_up_on_any_sentence_is_refused_when_read(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RejectedError, match=r"tokenizer\.json: gives up on"):
        load(tmp_path, "([^q]+)+(?<=q)")
    assert capfd.readouterr() == ("", "")


class PanicException(BaseException):  # as PyO3 calls it
    pass


class OtherException(BaseException):
    pass


def test_only_panics_are_caught_and_the_screen_comes_back(
    capfd: pytest.CaptureFixture[str],
) -> None:
    def fail(error: BaseException) -> None:
        os.write(2, b"noise\n")
        raise error

    with pytest.raises(PanicError, match=r"^first$"):
        guarded(fail, PanicException("first\nsecond"))
    for error in (KeyboardInterrupt(), SystemExit(2), OtherException(), ValueError("own")):
        with pytest.raises(type(error)):
            guarded(fail, error)
    os.write(2, b"heard\n")
    assert capfd.readouterr().err == "heard\n"


def test_the_screen_comes_back_after_the_last_of_several_threads(
    capfd: pytest.CaptureFixture[str],
) -> None:
    inside, leave = threading.Event(), threading.Event()

    def stay() -> None:
        inside.set()
        leave.wait()

    thread = threading.Thread(target=guarded, args=(stay,))
    thread.start()
    inside.wait()
    assert guarded(os.getpid) == os.getpid()
    os.write(2, b"unheard\n")
    leave.set()
    thread.join()
    os.write(2, b"heard\n")
    assert capfd.readouterr().err == "heard\n"
