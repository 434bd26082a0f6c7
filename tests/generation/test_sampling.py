"""Sampling: filters against a plain float64 reference, draws against their probabilities."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from apertus_mlx.checkpoint.generation_config import GenerationConfig
from apertus_mlx.errors import UsageError
from apertus_mlx.generation.options import SamplingOptions
from apertus_mlx.generation.sampling import (
    Sampler,
    SamplingParams,
    filter_logits,
    penalize,
    resolve_params,
)
from apertus_mlx.model.language_model import NextTokenLogits

LOGITS = np.random.default_rng(0).normal(0, 3, 500)


def reference(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """Probabilities after temperature, top-k, top-p and min-p, in that order (transformers)."""
    scaled = logits / params.temperature
    kept = np.ones(len(logits), bool)
    if params.top_k:
        kept &= scaled >= np.sort(scaled)[-min(params.top_k, len(logits))]
    p = np.where(kept, np.exp(scaled - scaled.max()), 0)
    p /= p.sum()
    if params.top_p < 1:
        total, nucleus = 0.0, np.zeros(len(p), bool)
        for index in np.argsort(-p):
            nucleus[index] = True
            total += p[index]
            if total >= params.top_p:
                break
        p = np.where(nucleus, p, 0)
    p = np.where(p >= params.min_p * p.max(), p, 0)
    return p / p.sum()


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 1.0, "top_p": 1.0},
        {"temperature": 0.5, "top_p": 1.0},
        {"temperature": 3.0, "top_p": 0.9},
        {"temperature": 1.0, "top_p": 0.01},
        {"temperature": 1.0, "top_p": 1.0, "top_k": 7},
        {"temperature": 2.0, "top_p": 0.5, "top_k": 40},
        {"temperature": 1.0, "top_p": 1.0, "min_p": 0.1},
        {"temperature": 1.5, "top_p": 0.95, "top_k": 100, "min_p": 0.02},
        {"temperature": 1.0, "top_p": 1.0, "top_k": 10_000},
        # At the bounds of what is accepted.
        {"temperature": 1e-6, "top_p": 1.0},
        {"temperature": 100.0, "top_p": 1.0},
        {"temperature": 1.0, "top_p": 2.0**-126},
        {"temperature": 100.0, "top_p": 2.0**-126},
        {"temperature": 3.0, "top_p": 1 - 2.0**-24},
        {"temperature": 100.0, "top_p": 1.0, "min_p": 2.0**-126},
        {"temperature": 0.03, "top_p": 1.0, "min_p": 2.0**-126},
        {"temperature": 1.0, "top_p": 1.0, "min_p": 1.0},
        {"temperature": 1e-6, "top_p": 2.0**-126, "min_p": 2.0**-126, "top_k": 2},
    ],
)
def test_filters(values: dict[str, Any]) -> None:
    params = SamplingParams(**values)
    logits = LOGITS.astype(np.float32).astype(np.float64)
    probabilities = mx.softmax(filter_logits(NextTokenLogits(mx.array(LOGITS)), params))
    np.testing.assert_allclose(np.array(probabilities), reference(logits, params), atol=1e-6)


def test_the_coldest_temperature_tells_neighbours_apart() -> None:
    """Two logits near 20 that are one step of float32 apart: exp(1.9) to 1."""
    low = np.float32(20)
    logits = np.array([low, np.nextafter(low, np.float32(21)), 19], np.float64)
    params = SamplingParams(temperature=1e-6, top_p=1.0)
    probabilities = mx.softmax(
        filter_logits(NextTokenLogits(mx.array(logits.astype(np.float32))), params)
    )
    expected = reference(logits, params)
    assert 0.1 < expected[0] < 0.2
    np.testing.assert_allclose(np.array(probabilities), expected, atol=1e-6)


@pytest.mark.parametrize("temperature", [9.9e-7, 1e-37, 1e-38, 1e-300, 5e-324, 0.0, -0.0])
def test_colder_is_greedy(temperature: float) -> None:
    sampler = Sampler(SamplingParams(temperature=temperature, seed=3), [], len(LOGITS))
    assert int(sampler(NextTokenLogits(mx.array(LOGITS)))) == int(np.argmax(LOGITS))


@pytest.mark.parametrize("penalty", [1e-20, 1e-6, 0.5, 100.0])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16])
def test_penalties_at_their_bounds(penalty: float, dtype: mx.Dtype) -> None:
    logits = mx.array(LOGITS).astype(dtype)
    exact = np.array(logits.astype(mx.float32)).astype(np.float64)
    seen = np.arange(len(LOGITS)) % 3 == 0
    expected = np.where(seen, np.where(exact > 0, exact / penalty, exact * penalty), exact)
    found = np.array(penalize(logits, mx.array(seen), penalty))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    params = SamplingParams(temperature=1.0, top_p=1.0, repetition_penalty=penalty)
    probabilities = mx.softmax(filter_logits(NextTokenLogits(mx.array(found)), params))
    np.testing.assert_allclose(np.array(probabilities), reference(expected, params), atol=1e-6)


def test_draws_follow_the_probabilities() -> None:
    params = SamplingParams(temperature=2.0, top_p=0.8, seed=1)
    sampler = Sampler(params, [], len(LOGITS))
    logits = mx.array(LOGITS)
    draws = 1500
    counts = Counter(int(sampler(NextTokenLogits(logits))) for _ in range(draws))
    expected = reference(LOGITS, params)
    assert set(counts) <= set(np.flatnonzero(expected).tolist())
    for token, count in counts.items():
        deviation = math.sqrt(draws * expected[token] * (1 - expected[token])) + 1
        assert abs(count - draws * expected[token]) < 6 * deviation


def test_same_seed_same_draws() -> None:
    def draws(seed: int) -> list[int]:
        sampler = Sampler(SamplingParams(temperature=2.0, seed=seed), [], len(LOGITS))
        return [int(sampler(NextTokenLogits(mx.array(LOGITS)))) for _ in range(20)]

    assert draws(5) == draws(5)
    assert draws(5) != draws(6)


def test_repetition_penalty_counts_prompt_and_answer() -> None:
    logits = mx.array([3.0, 2.0, -1.0, 1.9])
    seen = mx.array([True, False, True, False])
    assert penalize(logits, seen, 2.0).tolist() == pytest.approx([1.5, 2.0, -2.0, 1.9])
    sampler = Sampler(SamplingParams(temperature=0, repetition_penalty=2.0), [0], 4)
    # 0 is in the prompt, so 1 wins; then 1 is halved as well, so 3 wins; then 0 again.
    assert [int(sampler(NextTokenLogits(logits))) for _ in range(3)] == [1, 3, 0]


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0}, {"temperature": math.nan}, {"temperature": math.inf},
        {"top_p": 0.0}, {"top_p": 1.1}, {"top_p": math.nan}, {"top_k": -1}, {"min_p": 2.0},
        {"min_p": math.nan}, {"repetition_penalty": 0.0}, {"repetition_penalty": math.nan},
        {"seed": -1}, {"seed": 2**70}, {"top_p": 1e-38}, {"top_p": 1e-45}, {"top_p": 1e-46},
        {"top_p": 1e-300}, {"min_p": 1e-38}, {"min_p": 1e-300}, {"min_p": -1e-300},
        {"repetition_penalty": 1e-21}, {"repetition_penalty": 1e-39}, {"repetition_penalty": 1e39},
    ],
)  # fmt: skip
def test_values_outside_their_range(wrong: dict[str, Any]) -> None:
    name = next(iter(wrong)).replace("_", "-")
    with pytest.raises(UsageError, match=f"--{name}"):
        SamplingParams(**wrong)


def test_whose_word_counts() -> None:
    assert resolve_params(GenerationConfig(), SamplingOptions()).temperature == 0.8
    assert resolve_params(GenerationConfig(), SamplingOptions()).top_p == 0.9
    makers = GenerationConfig(temperature=0.5, top_k=20)
    params = resolve_params(makers, SamplingOptions())
    assert (params.temperature, params.top_k, params.top_p) == (0.5, 20, 1.0)
    assert resolve_params(makers, SamplingOptions(temperature=0, top_k=0)).greedy
    assert resolve_params(GenerationConfig(do_sample=False), SamplingOptions()).greedy
    assert not resolve_params(
        GenerationConfig(do_sample=False), SamplingOptions(temperature=1.0)
    ).greedy


def test_equal_tokens_stay_in_their_order() -> None:
    """Of tokens that are equal the lower ids stay, whatever sorts them."""
    logits = np.arange(400) * 7 % 5
    shares = np.exp(logits) / np.exp(logits).sum()
    total, expected = 0.0, []
    for token in sorted(range(400), key=lambda token: (-logits[token], token)):
        if total < 0.8:
            expected.append(token)
        total += shares[token]
    params = SamplingParams(temperature=1.0, top_p=0.8)
    found = np.array(filter_logits(NextTokenLogits(mx.array(logits)), params))
    assert np.flatnonzero(np.isfinite(found)).tolist() == sorted(expected)
