"""Probabilities of tokens: those of a plain forward pass, with bytes that join to the text."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from apertus_mlx.generation.model_folder import LoadedModel
from tests.server.running import ANSWER, QUESTION, Server, embedded, serving

FOLDER = embedded().folder


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return embedded()


@pytest.fixture(scope="module")
def server(loaded: LoadedModel) -> Iterator[Server]:
    with serving(load=lambda: loaded) as found:
        yield found


def reference(loaded: LoadedModel, ids: list[int]) -> np.ndarray:
    """Log probabilities `[len(ids), vocabulary]` of one pass over all, in float64."""
    logits = loaded.model(mx.array([ids]), loaded.model.make_cache())[0]
    values = np.asarray(logits.astype(mx.float32)).astype(np.float64)
    return (
        values
        - np.log(np.exp(values - values.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - (values.max(-1, keepdims=True))
    )


def test_of_a_chat(server: Server, loaded: LoadedModel) -> None:
    prompt = FOLDER.render(QUESTION)  # type: ignore[arg-type]
    answer = FOLDER.tokenizer.encode(ANSWER)
    # Neither temperature nor penalties change what is told.
    fields = {"logprobs": True, "top_logprobs": 3, "frequency_penalty": 0.1}
    found = server.chat(**fields).json()["choices"][0]["logprobs"]["content"]
    expected = reference(loaded, [*prompt, *answer])[len(prompt) - 1 :]
    assert bytes(byte for each in found for byte in each["bytes"]).decode() == ANSWER
    assert [each["token"] for each in found] == [FOLDER.tokenizer.decode([i]) for i in answer]
    for row, token, each in zip(expected, answer, found, strict=False):
        assert math.isclose(each["logprob"], row[token], abs_tol=1e-3)
        best = sorted(row, reverse=True)[:3]
        told = [other["logprob"] for other in each["top_logprobs"]]
        assert np.allclose(told, best, atol=2e-3) and told == sorted(told, reverse=True)
    body: dict[str, Any] = {"messages": QUESTION, "temperature": 0, **fields}
    pieces = [e["choices"][0] for e in server.events("/v1/chat/completions", body)[:-1]]
    streamed = [one for each in pieces if each["logprobs"] for one in each["logprobs"]["content"]]
    assert [each["bytes"] for each in streamed] == [each["bytes"] for each in found]


def test_of_a_text_cut_by_a_stop(server: Server) -> None:
    [choice] = server.chat(logprobs=True, stop="France").json()["choices"]
    joined = bytes(byte for each in choice["logprobs"]["content"] for byte in each["bytes"])
    # The token that the stop begins in is the last: its blank is part of the text.
    assert choice["message"]["content"] == "The capital of "
    assert joined.decode() == "The capital of France"


def test_of_a_prompt(server: Server, loaded: LoadedModel) -> None:
    body = {"prompt": "The capital of France", "max_tokens": 1, "prompt_logprobs": 2, "logprobs": 0}
    [choice] = server.post("/v1/completions", body).json()["choices"]
    ids = choice["prompt_token_ids"]
    rows = reference(loaded, ids)
    for row, token, told in zip(rows, ids[1:], choice["prompt_logprobs"][1:], strict=False):
        assert math.isclose(told[str(token)]["logprob"], row[token], abs_tol=1e-3)
        assert str(int(row.argmax())) in told
    assert choice["logprobs"]["top_logprobs"] == [{}]


def test_none_that_tell_what_a_filter_hides() -> None:
    with serving(model={"filtered": True}, wait=False) as server:
        for path, body in (
            ("/v1/chat/completions", {"messages": QUESTION, "logprobs": True}),
            ("/v1/completions", {"prompt": "a", "logprobs": 1}),
            ("/v1/completions", {"prompt": "a", "prompt_logprobs": 1}),
        ):
            response = server.post(path, body)
            assert response.status_code == 400 and "filter" in response.text
