"""Prompts without end: refused before they are encoded, or even read whole."""

from __future__ import annotations

from commands import command, refusal


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
