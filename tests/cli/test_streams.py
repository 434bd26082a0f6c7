"""Standard streams that are closed, full or of another encoding: an answer, or one line."""

from __future__ import annotations

import json
import os
import subprocess

import pytest

from tests.commands import COMMAND, command, refusal

GOLD = "Was ist das Symbol für Gold?"
ANSWER = "Das chemische Symbol für Gold ist Au."
PARIS = b"The capital of France is Paris."
QUESTION = "What is the capital of France?"


def test_a_stdout_that_lacks_characters_gets_all_of_the_answer() -> None:
    done = command("generate", GOLD, "-t", "0", PYTHONIOENCODING="ascii")
    assert done.returncode == 0
    assert done.stdout.decode("ascii").strip() == ANSWER.replace("ü", "\\xfc")
    done = command("generate", GOLD, "-t", "0", "--json", PYTHONIOENCODING="ascii")
    assert json.loads(done.stdout.decode("ascii"))["text"] == ANSWER


def test_one_byte_that_is_no_text() -> None:
    """A conversation goes on with it; a prompt is refused, with the place of the byte."""
    strict = {"PYTHONIOENCODING": "utf-8:strict"}
    talk = b"caf\xe9\n" + QUESTION.encode() + b"\n"
    done = command("chat", "-t", "0", stdin=talk, **strict)
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) == 2 and PARIS in done.stdout.splitlines()[1]
    line = refusal(command("generate", stdin=b"caf\xe9\n", **strict), 2)
    assert "0xe9 at 3" in line and "iconv" in line
    line = refusal(command("generate", b"caf\xe9"), 2)
    assert "argument 2" in line and "0xe9 at 3" in line


def test_a_closed_stderr_takes_nothing_from_the_answer() -> None:
    for redirect in ("2>&-", "2>/dev/full"):
        done = command("generate", QUESTION, "-t", "0", redirect=redirect)
        assert (done.returncode, done.stdout.strip(), done.stderr) == (0, PARIS, b"")


def test_a_closed_stdin() -> None:
    for arguments in (["generate"], ["chat"]):
        assert "standard input is closed" in refusal(command(*arguments, redirect="<&-"), 2)
    done = command("generate", QUESTION, "-t", "0", redirect="<&-")
    assert (done.returncode, done.stdout.strip()) == (0, PARIS)


@pytest.mark.parametrize("arguments", [["generate", "-m", "absent", "x"], ["--help"]])
def test_a_closed_stdout_is_refused_before_any_work(arguments: list[str]) -> None:
    for redirect in (">&-", "1</dev/null"):
        assert "standard output is closed" in refusal(command(*arguments, redirect=redirect), 2)
    assert command(*arguments, redirect=">&- 2>&- <&-").returncode == 2


def test_a_full_stdout() -> None:
    for arguments in (["inspect", "--json"], ["generate", QUESTION, "-t", "0"], ["--help"]):
        line = refusal(command(*arguments, redirect=">/dev/full"), 5)
        assert "standard output" in line or "disk is full" in line


def test_a_stdout_that_does_not_block() -> None:
    """As a parent may leave it: a text longer than the pipe holds comes out whole."""
    ours, theirs = os.pipe()
    os.set_blocking(theirs, False)
    process = subprocess.Popen([*COMMAND, "generate", "--help"], stdout=theirs)
    os.close(theirs)
    with os.fdopen(ours, "rb") as reader:
        text = reader.read()
    assert process.wait(timeout=60) == 0
    assert text == command("generate", "--help").stdout


def test_a_reader_that_left_before_the_first_word() -> None:
    for arguments in (["--help"], ["inspect"]):
        ours, theirs = os.pipe()
        os.close(ours)
        done = subprocess.run(
            [*COMMAND, *arguments], stdout=theirs, stderr=subprocess.PIPE, timeout=60, check=False
        )
        os.close(theirs)
        assert done.returncode == 0
        assert b"Traceback" not in done.stderr and b"Broken" not in done.stderr
