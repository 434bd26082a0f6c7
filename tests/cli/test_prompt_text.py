"""Prompts without end: refused before they are encoded, or even read whole."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from apertus_mlx.errors import UsageError
from apertus_mlx.generation.model_folder import ModelFolder
from apertus_mlx.text.tokenizer import Tokenizer
from tests.chat_tokenizers import load_tokenizer, write_tokenizer
from tests.commands import command, refusal


def test_a_prompt_far_beyond_the_context_is_not_encoded() -> None:
    """Its tokens are not counted: 4 MB would take 0.8 GB."""
    text = b"word " * 800_000
    line = refusal(command("generate", stdin=text), 2)
    assert "tokens or more" in line and "2048" in line
    done = command("chat", "-t", "0", stdin=text + b"\nWhat is the capital of France?\n")
    assert (done.returncode, done.stdout.strip()) == (0, b"The capital of France is Paris.")
    assert b"tokens or more" in done.stderr


def test_standard_input_that_never_ends() -> None:
    assert "64 MiB" in refusal(command("generate", redirect="</dev/zero"), 2)


def test_a_short_prompt_needs_no_look_at_the_vocabulary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(write_tokenizer(tmp_path))
    folder: Any = SimpleNamespace(tokenizer=tokenizer, context_length=6)
    asked: list[str] = []
    least = Tokenizer.least_tokens

    def noted(self: Tokenizer, text: str) -> int:
        asked.append(text)
        return least(self, text)

    monkeypatch.setattr(Tokenizer, "least_tokens", noted)
    # As many bytes as the context has positions: é has two, half a surrogate pair three.
    for text in ("", "x" * 6, "é" * 3, "\udcff" * 2):
        ModelFolder.require_short(folder, text)
    assert not asked
    ModelFolder.require_short(folder, "x" * 7)
    assert asked == ["x" * 7]
    with pytest.raises(UsageError, match="tokens or more"):
        ModelFolder.require_short(folder, "x" * 10_000)
