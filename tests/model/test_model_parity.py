"""The model computes what transformers and mlx-lm compute, in float32."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load_file

from apertus_mlx.backend.mlx import load_model
from apertus_mlx.cache import FullCache
from apertus_mlx.generation.decode import decode, prefill
from apertus_mlx.generation.sampling import Sampler, SamplingParams
from apertus_mlx.model.apertus import Model
from tests.builders import config_4x, random_weights, write_checkpoint
from tests.parity_cases import CASES, GREEDY_TOKENS, PROMPT

pytestmark = pytest.mark.gpu

GOLDEN = load_file(Path(__file__).parents[1] / "data" / "transformers_golden.safetensors")
TOLERANCE = 1e-4  # of the logits' standard deviation
mlx_lm_utils = pytest.importorskip("mlx_lm.utils")


def load_case(name: str, directory: Path) -> Model:
    config, shards = CASES[name]
    return load_model(write_checkpoint(directory, config, shards=shards))


def greedy(model: Model, prompt: list[int], count: int, step: int = 512) -> list[int]:
    cache = model.make_cache()
    logits = prefill(model, prompt, cache, step)
    sampler = Sampler(SamplingParams(temperature=0), prompt, logits.size)
    return list(decode(model, logits, cache, sampler, count))


def assert_close(ours: mx.array, reference: np.ndarray) -> None:
    difference = np.abs(np.array(ours) - reference).max()
    assert difference <= TOLERANCE * reference.std(), difference / reference.std()


@pytest.mark.parametrize("name", CASES)
def test_equals_recorded_transformers(name: str, tmp_path: Path) -> None:
    model = load_case(name, tmp_path)
    assert_close(model(mx.array([PROMPT]))[0, -3:], GOLDEN[f"{name}.logits"])
    assert greedy(model, PROMPT, GREEDY_TOKENS) == GOLDEN[f"{name}.greedy"].tolist()


@pytest.mark.nightly
@pytest.mark.parametrize("name", CASES)
def test_equals_installed_transformers(name: str, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from tests.transformers_reference import logits_and_greedy

    config, _ = CASES[name]
    reference, _ = logits_and_greedy(config, random_weights(config), PROMPT, 0)
    assert_close(load_case(name, tmp_path)(mx.array([PROMPT]))[0], reference)


# mlx-lm reads neither configs of transformers 5 nor a head_dim of its own.
@pytest.mark.parametrize(
    "name", [name for name, (c, _) in CASES.items() if "rope_theta" in c and "head_dim" not in c]
)
def test_equals_mlx_lm(name: str, tmp_path: Path) -> None:
    from mlx_lm.generate import generate_step

    model = load_case(name, tmp_path)
    reference, _ = mlx_lm_utils.load_model(tmp_path)
    assert_close(model(mx.array([PROMPT]))[0], np.array(reference(mx.array([PROMPT]))[0]))
    steps = generate_step(mx.array(PROMPT), reference, max_tokens=GREEDY_TOKENS)
    assert greedy(model, PROMPT, GREEDY_TOKENS) == [token for token, _ in steps]


def test_mlx_lm_generates_with_our_model(tmp_path: Path) -> None:
    """Our model answers to mlx-lm's interface: its own generation loop and caches run it."""
    from mlx_lm.generate import generate_step
    from mlx_lm.models.cache import KVCache

    model = load_case("untied_llama3", tmp_path)
    expected = greedy(model, PROMPT, 32)
    own_caches = generate_step(mx.array(PROMPT), model, max_tokens=32, prefill_step_size=5)
    assert [token for token, _ in own_caches] == expected
    theirs = [KVCache() for _ in model.layers]
    steps = generate_step(mx.array(PROMPT), model, max_tokens=32, prompt_cache=theirs)
    assert [token for token, _ in steps] == expected


@pytest.mark.parametrize("step", [1, 2, 5, 11, 12, 512])
def test_chunked_prefill_equals_one_shot(step: int, tmp_path: Path) -> None:
    model = load_case("tied_llama3_5x", tmp_path)
    whole = model(mx.array([PROMPT]))[0, -1]
    cache = model.make_cache()
    assert_close(prefill(model, PROMPT, cache, step), np.array(whole))
    assert cache[0].offset == len(PROMPT)


def test_cache_grows_over_its_steps(tmp_path: Path) -> None:
    """Positions beyond the first buffer, and rewinding into it, give the same logits."""
    model = load_case("untied_default", tmp_path)
    ids = [int(i) for i in np.random.default_rng(0).integers(74, 330, 400)]
    expected = np.array(model(mx.array([ids]))[0, -1])
    cache = model.make_cache()
    prefill(model, ids[:250], cache)
    prefill(model, ids[250:300], cache, 7)
    assert all(layer.trim(60) == 60 for layer in cache)
    assert_close(prefill(model, ids[240:], cache, 64), expected)
    assert isinstance(cache[0], FullCache)
    assert cache[0].state[0].shape[2] == 512


def test_bfloat16_computes_in_bfloat16(tmp_path: Path) -> None:
    """Nothing on the way promotes: a stray float32 would double the cache on a GPU."""
    config = config_4x()
    model = load_model(write_checkpoint(tmp_path, config, dtype=mx.bfloat16), "bfloat16")
    cache = model.make_cache()
    assert model(mx.array([PROMPT]), cache).dtype == mx.bfloat16
    assert {array.dtype for array in cache[0].state} == {mx.bfloat16}
