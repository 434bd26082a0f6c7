"""The graph of a decode step: how many kernels it takes, and that saving some changes no number."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from apertus_mlx.backend import command_buffers
from apertus_mlx.backend.metal.compiled_step import CompiledStep
from apertus_mlx.backend.mlx import load_model
from apertus_mlx.cache import CacheConfig
from apertus_mlx.checkpoint.config import parse_config
from apertus_mlx.generation.decode import MIN_CHUNK, chunk_sizes, decode, prefill
from apertus_mlx.generation.sampling import Sampler, SamplingParams, kth_largest
from apertus_mlx.memory.speed import DISPATCHES_PER_LAYER, DISPATCHES_PER_TOKEN
from apertus_mlx.model.apertus import Attention, Model, Step
from apertus_mlx.model.embedding import ProductEmbedding
from apertus_mlx.model.language_model import NextTokenLogits
from tests import decode_step
from tests.builders import config_4x, random_weights, write_checkpoint
from tests.decode_step import JoinedPlain, mlx_lm_dispatches, our_dispatches
from tests.dispatch_count import count_dispatches

pytestmark = pytest.mark.usefixtures("compiling")

PROMPT = [1, 65, 74, 150, 233, 80, 201, 99]
# Layers of the released models.
LAYERS = {"0.5B": 20, "1.5B": 16}
AROUND_PRODUCTS = ("qk_norm_rope", "add_rms_norm")


def build(
    accepted: Callable[[str], bool] | None = None,
    layers: int = 2,
    dtype: mx.Dtype = mx.bfloat16,
    step: Step | None = None,
    compiled_activation: bool = False,
) -> Model:
    size = {"hidden_size": 128, "intermediate_size": 256, "tie_word_embeddings": True}
    config = config_4x(**size, num_hidden_layers=layers)
    return decode_step.build(config, accepted, dtype, step, compiled_activation)


GREEDY = SamplingParams(temperature=0)


@pytest.mark.parametrize(
    ("kernels", "budgets"),
    [
        (None, (324, 260)),
        (lambda place: place.startswith(AROUND_PRODUCTS), (204, 164)),
        (lambda place: not place.startswith("attention_input"), (143, 115)),
        (lambda place: True, (123, 99)),
    ],
    ids=["plain", "around products", "products", "all"],
)
def test_dispatch_budget(kernels: Callable[[str], bool] | None, budgets: tuple[int, int]) -> None:
    for name, budget in zip(LAYERS, budgets, strict=True):
        # As on a GPU, where the activation is compiled.
        found = our_dispatches(build(kernels, LAYERS[name], compiled_activation=True))
        print(name, found)
        assert found.total <= budget
        if kernels is None:
            # What the planner counts with.
            per_layer = DISPATCHES_PER_LAYER * LAYERS[name]
            assert found.total == per_layer + DISPATCHES_PER_TOKEN
        assert not found.kernels.keys() & {"AsType", "Copy", "Contiguous", "Concatenate"}


def test_the_counter_knows_the_budget_of_mlx_lm() -> None:
    """Counted by hand from its source: 18 for a layer and 9 for the rest, of a tied model."""
    pytest.importorskip("mlx_lm")
    config = config_4x(hidden_size=128, intermediate_size=256, tie_word_embeddings=True)
    assert mlx_lm_dispatches(config).total == 2 * 18 + 9


def test_the_counter_sees_what_should_not_be_there() -> None:
    x, buffer = mx.zeros((4, 8)), mx.zeros((4, 8))
    mx.eval(x, buffer)

    def step() -> list[mx.array]:
        buffer[1:2] = x[:1] + 1
        return [buffer.astype(mx.float16).reshape(8, 4).T + 1]

    found = count_dispatches(step)
    assert found.kernels == {"Add": 2, "SliceUpdate": 1, "AsType": 1}
    assert found.epochs == 4


def test_joined_projections_give_the_same_bits() -> None:
    x = mx.random.normal((2, 3, 128))
    for bits in (2, 3, 4, 6):
        attention = Attention(parse_config(config_4x(hidden_size=128)))
        nn.quantize(attention, 64, bits)
        apart = attention.project(x)
        attention.fuse()
        assert attention.is_joined
        assert all(map(mx.array_equal, attention.project(x), apart))


def test_projections_of_different_formats_stay_apart() -> None:
    attention = Attention(parse_config(config_4x(hidden_size=128)))
    attention.q_proj = attention.q_proj.to_quantized(64, 4)
    attention.k_proj = attention.k_proj.to_quantized(64, 4)
    attention.v_proj = attention.v_proj.to_quantized(64, 6)
    attention.fuse()
    assert not attention.is_joined and "q_proj" in attention


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_an_embedding_row_by_product(bits: int) -> None:
    embedding = nn.QuantizedEmbedding(300, 128, 64, bits)
    assert ProductEmbedding.is_exact(embedding)
    by_product = ProductEmbedding(embedding)
    for token in (0, 7, 299):
        row = by_product(mx.array([[token]]))
        codes, scales, biases = (
            embedding[n][token : token + 1] for n in ("weight", "scales", "biases")
        )
        expected = mx.dequantize(codes, scales, biases, 64, bits)
        assert mx.allclose(row[0], expected, rtol=1e-6, atol=1e-7)


def test_a_wrong_product_is_noticed(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    embedding = nn.QuantizedEmbedding(300, 128, 64, 4)
    right = mx.gather_qmm
    monkeypatch.setattr(mx, "gather_qmm", lambda *a, **k: right(*a, **k) * 1.01)
    assert not ProductEmbedding.is_exact(embedding)
    assert "one row of the embedding" in caplog.text


def test_loaded_models_use_both(tmp_path: Path) -> None:
    config = config_4x(hidden_size=128, intermediate_size=256, tie_word_embeddings=True)
    model = load_model(write_checkpoint(tmp_path, config, random_weights(config)))
    assert all(layer.self_attn.is_joined for layer in model.layers)
    quantized = build(dtype=mx.float32)
    assert isinstance(quantized.model.embed_tokens, ProductEmbedding)


@pytest.mark.parametrize("step", [64, 128, 512, 2048])
def test_chunks_of_a_prompt(step: int) -> None:
    for length in (1, 63, 64, 65, step - 1, step, step + 1, 2 * step + 20, 3 * step + MIN_CHUNK):
        sizes = chunk_sizes(length, step)
        assert sum(sizes) == length
        assert all(0 < size <= step for size in sizes)
        if length > step >= 2 * MIN_CHUNK:
            assert min(sizes) >= MIN_CHUNK


@pytest.mark.parametrize(
    ("chip", "raised"),
    [
        ("Apple M1", True), ("Apple M2 Ultra", True), ("Apple M4 Max", True), ("Apple M5", False),
        ("Apple A18 Pro", False), ("", False),
    ],
)  # fmt: skip
def test_command_buffers(chip: str, raised: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", environment := {"MLX_MAX_MB_PER_BUFFER": "77"})
    command_buffers.widen(chip or "none")
    assert environment.get("MLX_MAX_OPS_PER_BUFFER") == ("1000" if raised else None)
    assert environment["MLX_MAX_MB_PER_BUFFER"] == "77"


def test_a_compiled_step_gives_the_same_tokens_and_logits() -> None:
    model = build(dtype=mx.float32, step=JoinedPlain())
    runs = []
    for compiled in (False, True):
        if compiled:
            model.use(CompiledStep(JoinedPlain()))
        caches = model.make_cache()
        logits = prefill(model, PROMPT, caches)
        sampler = Sampler(GREEDY, PROMPT, model.config.vocab_size)
        # Past the room of the first buffers, so that the step is traced twice.
        tokens = list(decode(model, logits, caches, sampler, 300))
        runs.append(
            (tokens, model.next_token_logits(mx.array([[7]]), caches).values, caches[0].offset)
        )
    assert runs[0][0] == runs[1][0]
    assert runs[0][2] == runs[1][2] == len(PROMPT) + 300
    assert mx.allclose(runs[0][1], runs[1][1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", [CacheConfig(bound=64), CacheConfig(4, 4)])
def test_other_caches_do_without_a_compiled_step(form: CacheConfig) -> None:
    model = build(dtype=mx.float32, step=JoinedPlain())
    expected, caches = model.make_cache(form), model.make_cache(form)
    for cache in (expected, caches):
        prefill(model, PROMPT, cache)
    eager = model.next_token_logits(mx.array([[7]]), expected).values
    model.use(CompiledStep(JoinedPlain()))
    assert mx.array_equal(model.next_token_logits(mx.array([[7]]), caches).values, eager)


@pytest.mark.parametrize("runs", [8, 16, 64])
def test_the_kth_largest_logit_from_peaks(runs: int) -> None:
    random = np.random.default_rng(0)
    for _ in range(20):
        logits = random.integers(-40, 40, 256).astype(np.float32)  # many are equal
        peaks = logits.reshape(runs, -1).max(1)
        for k in (1, 2, 5, runs - 1, runs, 200):
            found = kth_largest(NextTokenLogits(mx.array(logits), peaks=mx.array(peaks)), k)
            assert found.item() == np.sort(logits)[-k]
