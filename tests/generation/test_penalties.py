"""Biases and penalties, alone and in pairs: as OpenAI's formula in float64, and as mlx-lm."""

from __future__ import annotations

import importlib.util
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from apertus_mlx.checkpoint.generation_config import GenerationConfig
from apertus_mlx.errors import UsageError
from apertus_mlx.generation.decode import draw_tokens
from apertus_mlx.generation.model_folder import open_folder
from apertus_mlx.generation.options import RunOptions, SamplingOptions
from apertus_mlx.generation.run import Generation
from apertus_mlx.generation.sampling import Sampler, SamplingParams, resolve_params
from apertus_mlx.model.language_model import NextTokenLogits
from tests.builders import config_4x, write_checkpoint
from tests.daily import every

SIZE, STEPS, PROMPT = 40, 30, (3, 4, 4, 9, 39)
LOGITS = np.random.default_rng(5).normal(0, 1.5, (STEPS, SIZE)).astype(np.float32)
CHOICES: dict[str, dict[str, Any]] = {
    "logit_bias": {"logit_bias": {0: 2.5, 7: -100, 11: 1.25, 39: -1.0}},
    "repetition_penalty": {"repetition_penalty": 1.7},
    "presence_penalty": {"presence_penalty": 1.5},
    "negative presence": {"presence_penalty": -2.0},
    "frequency_penalty": {"frequency_penalty": 0.75},
    "negative frequency": {"frequency_penalty": -0.3},
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.4},
    "min_p": {"min_p": 0.3},
    "temperature": {"temperature": 2.0},
}
PAIRS = [
    {**CHOICES[one], **CHOICES[two]}
    for one, two in itertools.combinations(CHOICES, 2)
    if not CHOICES[one].keys() & CHOICES[two].keys()
]


def adjusted(
    logits: np.ndarray,
    answer: Sequence[int],
    *,
    logit_bias: Mapping[int, float] = {},
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    **_: object,
) -> np.ndarray:
    """Bias; CTRL's penalty on prompt and answer; OpenAI's: mu[j] - c[j] * f - (c[j] > 0) * p."""
    mu = logits.astype(np.float64)
    for token, bias in logit_bias.items():
        mu[token] += bias
    for token in {*PROMPT, *answer}:
        mu[token] *= repetition_penalty if mu[token] <= 0 else 1 / repetition_penalty
    for token, count in Counter(answer).items():
        mu[token] -= count * frequency_penalty + (count > 0) * presence_penalty
    return mu


def support(
    mu: np.ndarray,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    **_: object,
) -> set[int]:
    """The tokens that may be drawn."""
    order = np.argsort(-mu)[: top_k or len(mu)]
    p = np.exp((mu[order] - mu[order[0]]) / temperature)
    p /= p.sum()
    kept = (np.cumsum(p) - p < top_p) & (p >= min_p * p[0])
    return set(order[kept].tolist())


@pytest.mark.parametrize("values", [*CHOICES.values(), *every(4, PAIRS)], ids=str)
def test_alone_and_in_pairs(values: dict[str, Any]) -> None:
    greedy = Sampler(SamplingParams(**{**values, "temperature": 0}), PROMPT, SIZE)
    drawn = Sampler(
        SamplingParams(**{"temperature": 1.0, "top_p": 1.0, **values, "seed": 1}), PROMPT, SIZE
    )
    answer: list[int] = []
    other: list[int] = []
    for logits in LOGITS:
        given = NextTokenLogits(mx.array(logits))
        expected = int(np.argmax(adjusted(logits, answer, **values)))
        answer.append(int(greedy(given)))
        assert answer[-1] == expected
        allowed = support(adjusted(logits, other, **values), **values)
        other.append(int(drawn(given)))
        assert other[-1] in allowed


def test_a_mask_comes_after_all_of_them() -> None:
    values = {"logit_bias": {5: 100}, "presence_penalty": -2.0, "repetition_penalty": 0.5}
    allowed = np.zeros(SIZE, bool)
    allowed[[8, 13, 21]] = True
    for temperature in (0.0, 1.0):
        sampler = Sampler(SamplingParams(**values, temperature=temperature), PROMPT, SIZE)
        answer: list[int] = []
        for logits in LOGITS:
            answer.append(int(sampler(NextTokenLogits(mx.array(logits)), mx.array(allowed))))
            assert allowed[answer[-1]]
            if not temperature:
                mu = np.where(allowed, adjusted(logits, answer[:-1], **values), -np.inf)
                assert answer[-1] == int(np.argmax(mu))


def their_samplers() -> Any:
    """mlx-lm's module alone; the package would import transformers."""
    package = importlib.util.find_spec("mlx_lm")
    assert package is not None and package.origin is not None
    path = Path(package.origin).with_name("sample_utils.py")
    spec = importlib.util.spec_from_file_location("their_samplers", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_as_mlx_lm() -> None:
    """Its contexts are long enough here that they hold all; it counts the prompt for penalties."""
    utils = their_samplers()
    bias = {0: 2.5, 11: -1.25}
    processors = utils.make_logits_processors(
        logit_bias=bias, repetition_penalty=1.3, repetition_context_size=99,
        presence_penalty=0.5, presence_context_size=99,
        frequency_penalty=0.25, frequency_context_size=99,
    )  # fmt: skip
    # Without a prompt all three penalties see the same tokens in both.
    params = SamplingParams(
        temperature=0, logit_bias=bias, repetition_penalty=1.3, presence_penalty=0.5,
        frequency_penalty=0.25,
    )  # fmt: skip
    sampler = Sampler(params, [], SIZE)
    answer: list[int] = []
    for logits in LOGITS:
        theirs = mx.array(logits)[None]
        for process in processors if answer else processors[:1]:
            theirs = process(mx.array(answer), theirs)
        token = int(sampler(NextTokenLogits(mx.array(logits))))
        assert token == int(mx.argmax(theirs))
        answer.append(token)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_biases_are_added_in_float32(dtype: mx.Dtype) -> None:
    logits = mx.array([65_000.0, 64_000.0, 1.0]).astype(dtype)
    sampler = Sampler(SamplingParams(temperature=0, logit_bias={2: 100.0, 0: 100.0}), [], 3)
    assert int(sampler(NextTokenLogits(logits))) == 0


def test_decoding_runs_ahead_with_all_of_them() -> None:
    """A step is asked for before the token that it follows has been read."""
    params = SamplingParams(
        temperature=1.0, presence_penalty=1.0, frequency_penalty=0.1, logit_bias={1: 1.0}
    )
    steps: list[int] = []

    def step(token: mx.array) -> NextTokenLogits:
        steps.append(len(steps))
        return NextTokenLogits(mx.array(LOGITS[len(steps)]))

    sampler = Sampler(params, PROMPT, SIZE)
    for index, _ in enumerate(draw_tokens(step, mx.array(LOGITS[0]), sampler, 8)):
        assert len(steps) == min(index + 1, 7)


@pytest.mark.parametrize("compute", ["mlx", "cpu"])
def test_models_obey_a_bias(compute: Any, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, config_4x(num_hidden_layers=1))
    loaded = open_folder(folder).load(RunOptions(compute=compute))
    options = SamplingOptions(max_tokens=6, temperature=1.0, seed=1, logit_bias=["100=100"])
    run = Generation(loaded, [1, 80], options)
    list(run)
    assert run.answer.token_ids == [100] * 6
    # At the bound of what OpenAI allows, the second penalty is too small to matter.
    twice = SamplingOptions(
        max_tokens=4, temperature=0, logit_bias={100: 50, 101: 49}, frequency_penalty=2
    )
    run = Generation(loaded, [1, 80], twice)
    list(run)
    assert set(run.answer.token_ids) == {100, 101}
    with pytest.raises(UsageError, match="--logit-bias 384: the model's tokens are 0 to 383"):
        Generation(loaded, [1, 80], SamplingOptions(logit_bias={384: 1}))


def test_biases_as_text_and_as_mapping() -> None:
    asked = SamplingOptions(logit_bias=["42=-100", "7=1.5", "42=3"])
    assert resolve_params(GenerationConfig(), asked).logit_bias == {42: 3.0, 7: 1.5}
    assert SamplingOptions(logit_bias={42: 3}).biases == {42: 3.0}


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"logit_bias": ["x=1"]}, "--logit-bias 'x=1': expected ID=VALUE"),
        ({"logit_bias": ["7"]}, "expected ID=VALUE"),
        ({"logit_bias": ["7=nan"]}, "expected -100 to 100"),
        ({"logit_bias": {7: 101}}, "expected -100 to 100"),
        ({"logit_bias": {-1: 1}}, "expected the id of a token"),
        ({"presence_penalty": 2.1}, "--presence-penalty 2.1: expected -2 to 2"),
        ({"frequency_penalty": float("nan")}, "--frequency-penalty nan: expected -2 to 2"),
        ({"max_thought_tokens": -1}, "--max-thought-tokens -1"),
    ],
)
def test_values_outside_their_range(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        SamplingOptions(**wrong)


@pytest.mark.parametrize("wrong", [{"7": 1}, {7: "1"}, {True: 1}, 7])
def test_biases_of_wrong_types(wrong: Any) -> None:
    with pytest.raises(TypeError, match="logit_bias"):
        SamplingOptions(logit_bias=wrong)
