"""mlx-lm's tools run our model with our caches; its own Apertus runs with those of arrays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from apertus_mlx.backend.mlx import load_model
from apertus_mlx.cache import FULL_PRECISION, CacheConfig, make_layer_cache
from apertus_mlx.generation.decode import decode, prefill
from apertus_mlx.generation.sampling import Sampler, SamplingParams
from apertus_mlx.model.apertus import Model
from tests.builders import config_4x, random_weights, write_checkpoint
from tests.daily import every

pytestmark = pytest.mark.gpu

generate = pytest.importorskip("mlx_lm.generate")
mlx_lm_cache = pytest.importorskip("mlx_lm.models.cache")

PROMPT = [(7 * i * i + 3 * i) % 300 for i in range(180)]
FORMS = [
    FULL_PRECISION,
    CacheConfig(bound=100),
    CacheConfig(8, 8),
    CacheConfig(4, 3),
    CacheConfig(4, 4, bound=200),
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = config_4x(head_dim=64, hidden_size=256, vocab_size=300)
    folder = tmp_path_factory.mktemp("model")
    return write_checkpoint(folder, config, random_weights(config), tokenizer=False)


@pytest.fixture(scope="module")
def model(directory: Path) -> Model:
    return load_model(directory, "float32")


@pytest.fixture(scope="module")
def their_model(directory: Path) -> Any:
    from mlx_lm.models import apertus

    args = apertus.ModelArgs.from_dict(config_4x(head_dim=64, hidden_size=256, vocab_size=300))
    theirs = apertus.Model(args)
    weights = mx.load(str(directory / "model.safetensors"))
    assert isinstance(weights, dict)
    theirs.load_weights(list(theirs.sanitize(weights).items()))
    return theirs


def our_tokens(model: Model, form: CacheConfig, count: int) -> list[int]:
    cache = model.make_cache(form)
    logits = prefill(model, PROMPT, cache, 64)
    sampler = Sampler(SamplingParams(temperature=0), PROMPT, 300)
    return list(decode(model, logits, cache, sampler, count))


def their_tokens(model: Any, caches: list[Any], count: int) -> list[int]:
    steps = generate.generate_step(
        mx.array(PROMPT), model, max_tokens=count, prompt_cache=caches, prefill_step_size=50
    )
    return [int(token) for token, _ in steps]


@pytest.mark.parametrize("form", every(4, FORMS), ids=str)
def test_mlx_lm_generates_with_our_model_and_caches(model: Model, form: CacheConfig) -> None:
    expected = our_tokens(model, form, 20)
    assert their_tokens(model, model.make_cache(form), 20) == expected


@pytest.mark.parametrize("form", FORMS[:2], ids=str)
def test_mlx_lms_own_apertus_runs_with_our_caches(
    model: Model, their_model: Any, form: CacheConfig
) -> None:
    caches = [make_layer_cache(form, 64) for _ in model.layers]
    assert their_tokens(their_model, caches, 20) == our_tokens(model, form, 20)


def test_our_bound_equals_mlx_lms_rotating_cache(their_model: Any, model: Model) -> None:
    rotating = [mlx_lm_cache.RotatingKVCache(max_size=100, keep=4) for _ in model.layers]
    ours = [make_layer_cache(CacheConfig(bound=100, sinks=4), 64) for _ in model.layers]
    # Inside a chunk mlx-lm's window is by 4 wider than in decoding, so one token at a time.
    for token in PROMPT:
        ids = mx.array([[token]])
        expected, got = their_model(ids, cache=rotating), their_model(ids, cache=ours)
        assert mx.abs(expected - got).max().item() < 1e-3


def test_mlx_lm_trims_and_our_model_takes_its_caches(model: Model) -> None:
    caches: list[Any] = model.make_cache(CacheConfig(4, 4))
    model(mx.array([PROMPT]), caches)
    assert mlx_lm_cache.can_trim_prompt_cache(caches)
    assert mlx_lm_cache.trim_prompt_cache(caches, 5) == 5
    assert [cache.offset for cache in caches] == [len(PROMPT) - 5] * len(caches)
    theirs: list[Any] = [mlx_lm_cache.KVCache() for _ in model.layers]
    assert their_tokens(model, theirs, 20) == our_tokens(model, FULL_PRECISION, 20)
