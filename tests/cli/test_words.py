"""What a user reads: who did what, where, and the way out; in one line, and true."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import pytest

from apertus_mlx.cli import eval as evaluation
from apertus_mlx.cli import main
from apertus_mlx.cli.app import app


def said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, str]:
    """The exit code and the last line on stderr."""
    monkeypatch.setattr(sys, "argv", ["apertus-mlx", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    code = int(ended.value.code or 0)
    return code, capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("generate", "hi", "--dtype", "int8"), "'--dtype': 'int8' is not one of 'bfloat16'"),
        (("generate", "hi", "-m", ""), "the model's name is empty"),
        (("chat", "-m", ""), "the model's name is empty"),
        (("bench", ""), "the model's name is empty"),
        (("inspect", ""), "the model's name is empty"),
        (("generate", "hi", "--kv-sink", "8"), "give --max-kv or --kv-bits, too"),
        (("plan", "--kv-rotate"), "give --kv-bits, too"),
        (("plan", "--device", "iphone 15 por"), "the nearest are iphone-15-pro"),
    ],
)
def test_wrong_usage(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    words: str,
) -> None:
    code, line = said(monkeypatch, capsys, *arguments)
    assert (code, line.startswith("error: ")) == (2, True)
    assert words in line and "Value error" not in line


@pytest.mark.parametrize(
    ("command", "columns"),
    [
        ("eval", evaluation.HEADER),
        ("plan", ("KV/token:", "KV:", "prefill", "logits:", "peak:", "max ctx:", "tok/s:")),
        ("bench", ("KV read:", "roofline:", "±")),
    ],
)
def test_help_explains_the_columns(
    capsys: pytest.CaptureFixture[str], command: str, columns: Sequence[str]
) -> None:
    app([command, "--help"], standalone_mode=False)
    shown = " ".join(capsys.readouterr().out.split()).split("Arguments:")[0]
    assert [column for column in columns if column not in shown] == []
