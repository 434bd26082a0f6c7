"""Laws of the key-value caches, against float64 attention that masks and dequantizes by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apertus_mlx.backend import hardware
from apertus_mlx.cache import (
    CacheConfig,
    Codes,
    FullCache,
    QuantizedCache,
    expect,
    make_layer_cache,
    rewind,
)
from apertus_mlx.cache import attention as segmented
from apertus_mlx.cache.codes import quantize
from apertus_mlx.cache.config import STEP, read_cache_form
from apertus_mlx.cache.protocol import Cache
from apertus_mlx.cache.segments import rotate
from apertus_mlx.cache.store import capacity_for
from apertus_mlx.checkpoint.config import parse_config
from apertus_mlx.errors import UsageError
from apertus_mlx.model.apertus import Model
from tests.builders import config_4x, random_weights
from tests.daily import every

pytestmark = pytest.mark.gpu

HEADS, KEY_HEADS = 4, 2
BITS = (2, 3, 4, 6, 8)
laws = settings(max_examples=15, deadline=None)


def new_cache(config: CacheConfig) -> FullCache | QuantizedCache:
    """As a model on this machine makes it."""
    return make_layer_cache(config, 32, whole_codes=hardware.refuses_slices())


class Rows:
    """Random queries, keys and values of some positions."""

    def __init__(self, length: int, head_dim: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.q = rng.standard_normal((1, HEADS, length, head_dim)).astype(np.float32)
        self.k = rng.standard_normal((1, KEY_HEADS, length, head_dim)).astype(np.float32)
        self.v = rng.standard_normal((1, KEY_HEADS, length, head_dim)).astype(np.float32)

    def run(self, cache: Cache, chunks: Sequence[int], start: int = 0) -> np.ndarray:
        """Attention output `[1, heads, L, head_dim]` of all positions from `start` on."""
        scale = self.q.shape[-1] ** -0.5
        outputs = []
        for length in chunks:
            stop = start + length
            q, k, v = (mx.array(array[:, :, start:stop]) for array in (self.q, self.k, self.v))
            mask = cache.make_mask(length)
            keys, values = cache.update_and_fetch(k, v)
            if isinstance(keys, mx.array):
                output = mx.fast.scaled_dot_product_attention(
                    q, keys, values, scale=scale, mask=mask
                )
            else:
                output = segmented.attend(q, keys, values, scale, mask)
            outputs.append(np.array(output))
            start = stop
        return np.concatenate(outputs, axis=2)

    def reference(self, config: CacheConfig) -> np.ndarray:
        """The same in float64, one query at a time, from what `config` says a query sees."""
        length, head_dim = self.q.shape[2:]
        coded_k, coded_v = self.k.astype(np.float64), self.v.astype(np.float64)
        if config.key_bits < 16:
            if config.rotates(head_dim):
                rotated = quantize(rotate(mx.array(self.k)), config.key_bits, 32)
                coded_k = decode(rotated) @ _hadamard(head_dim)
            else:
                coded_k = decode(quantize(mx.array(self.k), config.key_bits, 32))
        if config.value_bits < 16:
            coded_v = decode(quantize(mx.array(self.v), config.value_bits, 32))
        outputs = np.zeros(self.q.shape, np.float64)
        for i in range(length):
            seen, coded = visible(config, i)
            for head in range(HEADS):
                k, v = (
                    np.where(
                        coded[:, None], codes[0, head // 2, : i + 1], rows[0, head // 2, : i + 1]
                    )
                    for codes, rows in ((coded_k, self.k), (coded_v, self.v))
                )
                scores = k[seen] @ self.q[0, head, i].astype(np.float64) * head_dim**-0.5
                weights = np.exp(scores - scores.max())
                outputs[0, head, i] = weights / weights.sum() @ v[seen]
        return outputs


def visible(config: CacheConfig, i: int) -> tuple[np.ndarray, np.ndarray]:
    """Which positions the query at `i` sees, and which of them as codes."""
    positions = np.arange(i + 1)
    sinks, window = config.sinks, config.window
    if min(config.key_bits, config.value_bits) == 16:
        seen = np.ones(i + 1, bool)
        if config.bound is not None:
            seen = (positions < sinks) | (positions > i - (config.bound - sinks))
        return seen, np.zeros(i + 1, bool)
    coded_count = max(0, (i + 1 - sinks - window) // 32) * 32
    coded = (positions >= sinks) & (positions < sinks + coded_count)
    seen = np.ones(i + 1, bool)
    if config.bound is not None:
        ring = (config.bound - sinks - window - 64) // 32 * 32
        seen = ~coded | (positions >= sinks + coded_count - ring)
    return seen, coded


def decode(codes: Codes) -> np.ndarray:
    """Unpack and dequantize in numpy, bit by bit."""
    words = np.array(codes.words)
    bits = np.unpackbits(words.view(np.uint8), axis=-1, bitorder="little")
    numbers = bits.reshape(*bits.shape[:-1], -1, codes.bits) @ (1 << np.arange(codes.bits))
    scales, biases = (
        np.repeat(np.array(array.astype(mx.float32), np.float64), codes.group_size, axis=-1)
        for array in (codes.scales, codes.biases)
    )
    return numbers * scales + biases


def _hadamard(size: int) -> np.ndarray:
    matrix = np.ones((1, 1))
    while matrix.shape[0] < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / size**0.5


@st.composite
def chunkings(draw: st.DrawFn, longest: int = 330) -> list[int]:
    chunks = draw(st.lists(st.sampled_from([1, 1, 2, 31, 32, 33, 64, 100]), min_size=1, max_size=9))
    while sum(chunks) > longest:
        chunks.pop()
    return chunks or [1]


@st.composite
def forms(draw: st.DrawFn) -> CacheConfig:
    sinks, window = draw(st.integers(0, 5)), draw(st.sampled_from([0, 1, 30, 64]))
    key_bits, value_bits = draw(st.sampled_from((*BITS, 16))), draw(st.sampled_from((*BITS, 16)))
    bound = draw(st.one_of(st.none(), st.integers(window + sinks + 96, 300)))
    rotate = draw(st.sampled_from([None, True, False]))
    return CacheConfig(key_bits, value_bits, bound, sinks, window, rotate)


@laws
@given(forms(), chunkings(), st.integers(0, 10**6))
def test_every_form_equals_its_float64_reference(
    config: CacheConfig, chunks: list[int], seed: int
) -> None:
    rows = Rows(sum(chunks), 32, seed)
    got = rows.run(new_cache(config), chunks)
    np.testing.assert_allclose(got, rows.reference(config), rtol=0, atol=3e-5)


@laws
@given(forms(), chunkings(), st.integers(0, 10**6))
def test_chunks_equal_one_shot(config: CacheConfig, chunks: list[int], seed: int) -> None:
    rows = Rows(sum(chunks), 32, seed)
    whole = rows.run(new_cache(config), [sum(chunks)])
    np.testing.assert_allclose(rows.run(new_cache(config), chunks), whole, rtol=0, atol=2e-5)


@laws
@given(forms(), chunkings(200), st.integers(0, 220), chunkings(200), st.integers(0, 10**6))
def test_rewinding_is_exact_or_refused(
    config: CacheConfig, before: list[int], back: int, after: list[int], seed: int
) -> None:
    start, more = sum(before), sum(after)
    rows = Rows(start + more, 32, seed)
    cache = new_cache(config)
    rows.run(cache, before)
    trimmed = cache.trim(back)
    assert trimmed in (0, min(back, start))
    assert cache.offset == start - trimmed
    kept = cache.offset
    fresh = new_cache(config)
    if kept:
        rows.run(fresh, [kept])
    got, expected = (rows.run(one, [*after[:-1], 1], kept) for one in (cache, fresh))
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "config", every(2, [CacheConfig(4, 4), CacheConfig(3, 16), CacheConfig()]), ids=str
)
def test_a_block_can_always_be_rewound(config: CacheConfig) -> None:
    rows = Rows(400, 32, 0)
    for length in range(330, 400, 11):
        cache = new_cache(config)
        rows.run(cache, [length])
        assert cache.is_trimmable()
        assert cache.trim(STEP) == STEP


@pytest.mark.parametrize("config", [CacheConfig(bound=100), CacheConfig(4, 4, bound=200)])
def test_what_a_ring_dropped_cannot_come_back(config: CacheConfig) -> None:
    rows = Rows(400, 32, 0)
    cache = new_cache(config)
    rows.run(cache, [340])
    assert not cache.is_trimmable() or config.quantized
    assert cache.trim(300) == 0
    assert cache.offset == 340
    assert not rewind([cache], 300)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("width", [32, 64, 128])
def test_codes_are_mlx_affine_codes(bits: int, width: int) -> None:
    x = mx.random.normal((1, 2, 33, 256), key=mx.random.key(bits))
    codes = quantize(x, bits, width)
    assert codes.words.shape == mx.quantize(x, width, bits)[0].shape
    read = np.array(codes.dequantize(mx.float32))
    np.testing.assert_allclose(read, decode(codes), rtol=0, atol=1e-5)


@pytest.mark.parametrize("bits", BITS[:-1])
def test_codes_lose_less_than_mlx_quantize(bits: int) -> None:
    x = mx.random.normal((1, 4, 256, 64), key=mx.random.key(1))
    theirs = mx.dequantize(*mx.quantize(x, 64, bits), 64, bits)
    ours = mx.array(decode(quantize(x, bits, 64)), mx.float32)
    assert mx.sum(mx.square(ours - x)).item() < mx.sum(mx.square(theirs - x)).item()


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_codes_of_constant_and_extreme_groups_are_finite(dtype: mx.Dtype) -> None:
    x = mx.concatenate([mx.zeros((1, 1, 2, 32)), mx.full((1, 1, 2, 32), -7.0)], axis=2)
    x = mx.concatenate([x, mx.full((1, 1, 1, 32), 6e4), -x[:, :, :1]], axis=2).astype(dtype)
    for bits in BITS:
        read = quantize(x, bits, 32).dequantize(mx.float32)
        assert mx.allclose(read, x.astype(mx.float32), rtol=1e-2).item()


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("bits", [*BITS, 16])
def test_bytes_of_a_position(bits: int, head_dim: int) -> None:
    config = CacheConfig(bits, bits)
    cache = make_layer_cache(config, head_dim)
    room = mx.zeros((1, 8, 1, head_dim), mx.bfloat16)

    def size(positions: int) -> int:
        kv = mx.broadcast_to(room, (1, 8, positions, head_dim))
        cache.update_and_fetch(kv, kv)
        return cache.nbytes

    first = size(4096 + (68 if bits < 16 else 0))
    slope = (size(4096) - first) / 4096
    overhead = 0 if bits == 16 else 32 / head_dim
    assert slope == 2 * 8 * head_dim * (bits + overhead) / 8
    if bits == 4:
        assert slope <= 0.30 * 2 * 8 * head_dim * 2


@pytest.mark.parametrize("config", [CacheConfig(bound=256), CacheConfig(4, 4, bound=256)])
def test_a_bound_holds(config: CacheConfig) -> None:
    cache = new_cache(config)
    sizes = []
    for length in [100, 1, 50, *[1] * 300, 700, *[1] * 40]:
        kv = mx.zeros((1, 2, length, 32))
        cache.update_and_fetch(kv, kv)
        mx.eval(cache.state)
        sizes.append(cache.nbytes)
        assert cache.size() <= 256
    whole = 2 * 2 * 256 * 32 * 4
    assert max(sizes) <= whole
    assert len(set(sizes[-60:])) == 1


def test_growth_wastes_at_most_an_eighth_and_copies_seldom() -> None:
    for rows in (1, 255, 256, 257, 3000, 4096, 5000, 65_536, 100_001):
        assert rows <= capacity_for(rows) <= max(rows + 255, rows * 9 / 8)
    growths = sorted({capacity_for(rows) for rows in range(1, 65_537)})
    assert sum(growths) <= 14 * 65_536


@pytest.mark.parametrize("config", [CacheConfig(), CacheConfig(4, 4), CacheConfig(bound=700)])
def test_what_is_expected_is_never_copied(config: CacheConfig) -> None:
    cache = make_layer_cache(config, 32)
    expect([cache], 3000)
    rows = mx.zeros((1, 2, 500, 32))
    cache.update_and_fetch(rows, rows)
    first = cache.nbytes
    for _ in range(5):
        cache.update_and_fetch(rows, rows)
        assert cache.nbytes == first
    plain = make_layer_cache(config, 32)
    for _ in range(6):
        plain.update_and_fetch(rows, rows)
    assert first == plain.nbytes


def _model(head_dim: int, seed: int) -> Model:
    config = config_4x(head_dim=head_dim, vocab_size=300)
    model = Model(parse_config(config))
    model.whole_codes = hardware.refuses_slices()
    weights = {name: mx.array(value) for name, value in random_weights(config, seed).items()}
    model.load_weights(list(weights.items()))
    return model


@pytest.mark.parametrize("head_dim", every(3, [64, 32, 128]))
@pytest.mark.parametrize(
    "form", every(2, [CacheConfig(bound=400, rotate=True), CacheConfig(rotate=True)])
)
def test_a_model_with_room_or_rotation_changes_nothing(head_dim: int, form: CacheConfig) -> None:
    model = _model(head_dim, seed=head_dim)
    ids = mx.random.randint(0, 300, (1, 380), key=mx.random.key(0))
    expected = model(ids)
    for chunk in (380, 128):
        cache = model.make_cache(form)
        parts = [model(ids[:, at : at + chunk], cache) for at in range(0, 380, chunk)]
        assert mx.abs(mx.concatenate(parts, axis=1) - expected).max().item() < 2e-4


@pytest.mark.parametrize("form", every(2, [CacheConfig(4, 4, bound=200), CacheConfig(8, 8)]))
def test_a_model_computes_the_same_in_chunks(form: CacheConfig) -> None:
    model = _model(64, seed=1)
    ids = mx.random.randint(0, 300, (1, 300), key=mx.random.key(0))
    whole = model(ids, model.make_cache(form))
    cache = model.make_cache(form)
    parts = [model(ids[:, at : at + 60], cache) for at in range(0, 240, 60)]
    parts += [model(ids[:, at : at + 1], cache) for at in range(240, 300)]
    assert mx.abs(mx.concatenate(parts, axis=1) - whole).max().item() < 2e-3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"key_bits": 5}, "--kv-bits 5"),
        ({"value_bits": 1}, "--kv-bits-v 1"),
        ({"sinks": -1}, "--kv-sink -1"),
        ({"bound": 0}, "--max-kv 0: expected 5 or more"),
        ({"bound": 100, "key_bits": 4}, "--max-kv 100: expected"),
    ],
)
def test_impossible_forms_are_refused(values: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        CacheConfig(**values)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((None, None, None, 8, None), "--kv-sink: .* give --max-kv or --kv-bits"),
        ((16, None, None, 8, None), "--kv-sink"),
        ((None, None, 100, None, True), "--kv-rotate: .* give --kv-bits"),
        ((16, 4, None, None, True), "--kv-rotate"),
    ],
)
def test_options_that_would_do_nothing_are_refused(options: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        read_cache_form(*options)


def test_options_that_do_something_are_taken() -> None:
    assert read_cache_form(None, None, 100, 8, False) == CacheConfig(
        bound=100, sinks=8, rotate=False
    )
    assert read_cache_form(4, None, None, 8, None) == CacheConfig(4, 4, sinks=8)
    assert read_cache_form(None, 4, None, 0, None) == CacheConfig(16, 4, sinks=0)
    assert read_cache_form(4, None, None, None, True) == CacheConfig(4, 4, rotate=True)


def test_heads_that_do_not_divide_are_refused_at_the_start() -> None:
    with pytest.raises(UsageError, match="head_dim 16 does not divide"):
        make_layer_cache(CacheConfig(4, 4), 16)
    with pytest.raises(UsageError, match="not a power of two"):
        make_layer_cache(CacheConfig(4, 4, rotate=True), 96)
    assert isinstance(make_layer_cache(CacheConfig(4, 4), 96), QuantizedCache)


@pytest.mark.parametrize("config", [CacheConfig(4, 3), CacheConfig(8, 8, bound=250)])
def test_blocks_of_queries_and_codes_change_nothing(
    config: CacheConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = Rows(300, 32, 5)
    expected = rows.reference(config)
    monkeypatch.setattr(segmented, "BLOCK", 40)
    monkeypatch.setattr(segmented, "MAX_SCORES_BYTES", HEADS * 300 * 4 * 17)
    got = rows.run(new_cache(config), [200, 100])
    np.testing.assert_allclose(got, expected, rtol=0, atol=3e-5)
