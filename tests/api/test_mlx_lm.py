"""The functions of mlx-lm that docs/python.md names, on `model.model`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from apertus_mlx import Apertus, load

mlx_lm: Any = pytest.importorskip("mlx_lm")
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
ANSWER = "The capital of France is Paris."


@pytest.fixture(scope="module")
def model() -> Iterator[Apertus]:
    with load(compute="mlx", dtype="float32") as loaded:
        yield loaded


@pytest.fixture(scope="module")
def tokenizer(model: Apertus) -> Any:
    from mlx_lm.utils import load_tokenizer

    return load_tokenizer(model.directory)


def test_generation(model: Apertus, tokenizer: Any) -> None:
    from mlx_lm.generate import generate_step
    from mlx_lm.models.cache import make_prompt_cache, trim_prompt_cache

    prompt = model.render(QUESTION)
    assert mlx_lm.generate(model.model, tokenizer, prompt=prompt, max_tokens=20) == ANSWER
    parts = mlx_lm.stream_generate(model.model, tokenizer, prompt, max_tokens=20)
    assert "".join(part.text for part in parts) == ANSWER
    own = model.generate(QUESTION, temperature=0).token_ids
    steps = generate_step(mx.array(prompt), model.model, max_tokens=len(own))
    assert [int(token) for token, _ in steps] == own
    cache = make_prompt_cache(model.model)
    told = [
        mlx_lm.generate(model.model, tokenizer, prompt=prompt, max_tokens=20, prompt_cache=cache)
    ]
    trim_prompt_cache(cache, cache[0].offset - len(prompt) + 1)
    told.append(
        mlx_lm.generate(
            model.model, tokenizer, prompt=prompt[-1:], max_tokens=20, prompt_cache=cache
        )
    )
    assert told == [ANSWER, ANSWER]
    assert model.generate(QUESTION, temperature=0).token_ids == own


def test_perplexity_is_that_of_logprobs(model: Apertus, capsys: pytest.CaptureFixture[str]) -> None:
    from mlx_lm.perplexity import eval_ppl

    text = ANSWER * 2
    perplexity, _ = eval_ppl(model.model, mx.array([[1, *model.encode(text)]]), batch_size=1)
    logprobs = model.logprobs(text)
    assert perplexity == pytest.approx(float(mx.exp(-mx.mean(mx.array(logprobs)))), rel=1e-4)
    capsys.readouterr()


def test_counts(model: Apertus) -> None:
    from mlx_lm.utils import compute_bits_per_weight, get_total_parameters, load_model

    peer = load_model(Path(model.directory))[0]
    assert get_total_parameters(model.model) == get_total_parameters(peer)
    assert compute_bits_per_weight(model.model) == pytest.approx(32, abs=0.1)
