"""A log of details shows where a prompt parts from earlier ones: there it is computed anew."""

from __future__ import annotations

import pytest

from apertus_mlx.cli.sink import log_shown
from tests.server.running import QUESTION, Server


def test_the_log_has_the_two_tokens(
    server: Server, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("APERTUS_MLX_DEBUG", "1")
    tokens = []
    for word in ("five", "nine"):
        text = f"You know tables of many facts about cities and rivers; there are {word} of them."
        asked = [{"role": "system", "content": text}, *QUESTION]
        capfd.readouterr()
        with log_shown():
            assert server.chat(messages=asked, max_tokens=1).status_code == 200
        body = {"messages": asked, "return_token_strs": True}
        tokens.append(server.post("/tokenize", body).json()["token_strs"])
    [(first, second), *_] = [pair for pair in zip(*tokens, strict=False) if pair[0] != pair[1]]
    lines = capfd.readouterr().err.splitlines()
    [told] = [line for line in lines if repr(first) in line and repr(second) in line]
    assert str(tokens[1].index(second)) in told


def test_without_the_switch_it_does_not(
    server: Server, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("APERTUS_MLX_DEBUG", raising=False)
    for word in ("one", "two"):
        text = f"You know tables of many facts about lakes and mountains; there are {word} of them."
        with log_shown():
            server.chat(messages=[{"role": "system", "content": text}, *QUESTION], max_tokens=1)
    [*lines] = capfd.readouterr().err.splitlines()
    assert len(lines) == 2 and all("POST" in line for line in lines)
