"""Panics of a Rust library: one line, for the file's fault or the prompt's, on a quiet screen."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from apertus_mlx.errors import ApertusError, RejectedError, UsageError
from apertus_mlx.system import rust_panics
from apertus_mlx.system.rust_panics import PanicError, guarded
from apertus_mlx.text.tokenizer import Tokenizer
from tests.chat_tokenizers import backend_json, vocab_size


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


@pytest.fixture
def interrupts() -> Iterator[None]:
    """SIGINT raises, whatever the runner of tests does with it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupts")
def test_the_screen_comes_back_whenever_an_interrupt_comes() -> None:
    """A real signal before each bytecode of the call, one after another, and one inside it."""
    screen, descriptors = os.fstat(2), len(list(Path("/dev/fd").iterdir()))
    moment = 1
    while call_with_signal(moment):
        assert os.path.samestat(os.fstat(2), screen), moment
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        moment += 1
    assert moment > 100
    with pytest.raises(KeyboardInterrupt):
        guarded(signal.raise_signal, signal.SIGINT)
    assert os.path.samestat(os.fstat(2), screen)
    assert len(list(Path("/dev/fd").iterdir())) == descriptors


def call_with_signal(moment: int) -> bool:
    """Call something guarded, with SIGINT before the n-th bytecode; False where it has fewer.

    Raises:
        AssertionError: the interrupt was lost.
    """
    left = moment

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal left
        if event == "call":
            if frame.f_code.co_filename not in (rust_panics.__file__, contextlib.__file__):
                return None
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
        elif event == "opcode":
            left -= 1
            if left == 0:
                signal.raise_signal(signal.SIGINT)
        return trace

    before = sys.gettrace()
    try:
        sys.settrace(trace)
        guarded(os.getpid)
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    assert left > 0
    return False


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


@pytest.mark.timeout(20)
def test_nobody_waits_for_a_silence_that_never_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after an exception that came, from outside, between taking the lock and noting it."""
    held = threading.Lock()
    held.acquire()
    monkeypatch.setattr(rust_panics, "_SILENT", held)
    assert guarded(os.getpid) == os.getpid()
