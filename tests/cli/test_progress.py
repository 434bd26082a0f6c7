"""Progress: when it is shown, and what of it a terminal or a log gets to see."""

from __future__ import annotations

import io
import os
import shutil
import sys
import time

import pytest

from apertus_mlx.cli.progress import show_progress
from apertus_mlx.system.progress import Progress

ORDER = "\x1b[31m"


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    encoding = "utf-8"  # type: ignore[assignment]

    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    monkeypatch.setattr(shutil, "get_terminal_size", lambda: os.terminal_size((60, 24)))
    monkeypatch.setenv("TERM", "xterm")
    return clock


def shown(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, seconds: int, **more: str
) -> str:
    """What a stage of two stages prints that reports every half a second for `seconds` each."""
    monkeypatch.setattr(sys, "stderr", stream)
    with show_progress() as progress:
        for stage in ("downloading", "converting"):
            for step in range(2 * seconds):
                progress(Progress(stage, step * 10**6, seconds * 2 * 10**6, "bytes", **more))
                clock.now += 0.5
    return stream.getvalue()


@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
def test_nothing_of_what_takes_less_than_a_second(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, stream: type[io.StringIO]
) -> None:
    assert shown(clock, monkeypatch, stream(), 1) == ""


def test_a_terminal_sees_one_line_that_leaves_nothing_behind(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = shown(clock, monkeypatch, Terminal(), 4, detail=ORDER)
    assert "\n" not in text and ORDER not in text
    drawn = [line.removesuffix("\x1b[K") for line in text.split("\r")[1:]]
    assert all(len(line) < 60 and line.isprintable() for line in drawn)
    # The line of the first stage goes before that of the second comes.
    assert [line[:11] for line in drawn].count("") == 2 and drawn[-1] == ""
    assert drawn[0].startswith("downloading: |") and "2.00M/8.00MB, 2.00MB/s" in drawn[0]


def test_a_log_gets_few_plain_lines(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(clock, monkeypatch, io.StringIO(), 25, detail=ORDER)
    lines = text.splitlines()
    assert [line.split(":")[0] for line in lines] == ["downloading"] * 2 + ["converting"] * 2
    assert "20.0M/50.0MB, 2.00MB/s, 00:15 left, \\x1b[31m" in lines[0]
    assert all(line.isprintable() for line in lines)
    assert shown(clock, monkeypatch, io.StringIO(), 9) == ""


def test_units_and_stages_without_an_end(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    for unit, expected in (
        ("layers", "measuring: 3/24 layer runs"),
        ("tokens", "3.00/24.0 tokens"),
    ):
        monkeypatch.setattr(sys, "stderr", stream := io.StringIO())
        with show_progress() as progress:
            progress(Progress("measuring", 0, 24, unit))  # type: ignore[arg-type]
            clock.now += 11
            progress(Progress("measuring", 3, 24, unit))  # type: ignore[arg-type]
        assert expected in stream.getvalue()
    monkeypatch.setattr(sys, "stderr", stream := io.StringIO())
    with show_progress() as progress:
        progress(Progress("loading", 0, None, "bytes"))
        clock.now += 11
        progress(Progress("loading", 22_000_000, None, "bytes"))
    assert stream.getvalue() == "loading: 22.0MB, 2.00MB/s\n"


def test_nothing_is_left_at_the_end_and_what_begins_again_counts_anew(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", stream := io.StringIO())
    with show_progress() as progress:
        for done in (0, 10, 20, 2, 4):
            progress(Progress("downloading", done * 10**6, 20 * 10**6, "bytes"))
            clock.now += 10
    assert stream.getvalue().splitlines() == [
        "downloading: 10.0M/20.0MB, 1.00MB/s, 00:10 left",
        "downloading: 20.0M/20.0MB, 1.00MB/s",
        "downloading: 4.00M/20.0MB, 200kB/s, 01:20 left",
    ]


def test_streams_that_are_closed(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    with show_progress() as progress:
        progress(Progress("loading", 0, 2, "bytes"))
        clock.now += 11
        progress(Progress("loading", 1, 2, "bytes"))
