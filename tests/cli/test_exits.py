"""Exit codes where something else than a command's end ends it: kept, and never silently 0."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import typer

from apertus_mlx import cli
from apertus_mlx.cli import app as application
from apertus_mlx.cli import sink


def break_a_pipe() -> None:
    raise BrokenPipeError(32, "Broken pipe")  # of a child, say


def exit_with(code: int | str | None) -> Callable[[], None]:
    def end() -> None:
        raise SystemExit(code)

    return end


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        (break_a_pipe, 1, "BrokenPipeError"), (exit_with(3), 3, ""), (exit_with(1), 1, ""),
        (exit_with(None), 0, ""), (exit_with(0), 0, ""), (exit_with("words"), 1, ""),
    ],
)  # fmt: skip
def test_the_code_of_a_command_that_ends_in_another_way(
    command: Callable[[], None],
    code: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    one = typer.Typer(add_completion=False)
    one.command()(command)
    monkeypatch.setattr(application, "app", one)
    monkeypatch.setattr(sink, "take_messages", lambda: None)
    monkeypatch.setattr(sys, "argv", ["apertus-mlx"])
    for name in ("stdout", "stderr"):  # typer wraps them
        monkeypatch.setattr(sys, name, getattr(sys, name))
    assert cli._run() == code
    assert said in capsys.readouterr().err
