"""Codes for products that take no slices, against the float64 reference of all caches."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from apertus_mlx.cache import CacheConfig, QuantizedCache, fork, make_layer_cache
from apertus_mlx.cache.protocol import Cache
from tests.cache.test_cache import Rows
from tests.simulated_gpu import REFUSAL, refuse_slices

pytestmark = pytest.mark.gpu

FORMS = [CacheConfig(4, 4), CacheConfig(3, 8, sinks=0, window=0), CacheConfig(4, 16),
         CacheConfig(8, 4, bound=260)]  # fmt: skip
CHUNKS = [70, 1, 130, *[1] * 40, 33, 5]


def whole(form: CacheConfig) -> Cache:
    return make_layer_cache(form, 32, whole_codes=True)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_growing_cache_is_taken_and_right(
    form: CacheConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = Rows(sum(CHUNKS), 32, 0)
    refuse_slices(monkeypatch)
    np.testing.assert_allclose(
        rows.run(whole(form), CHUNKS), rows.reference(form), rtol=0, atol=3e-5
    )


def test_the_usual_cache_is_refused_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the test above would prove nothing."""
    refuse_slices(monkeypatch)
    with pytest.raises(RuntimeError) as refused:
        Rows(200, 32, 0).run(make_layer_cache(FORMS[0], 32), [199, 1])
    assert str(refused.value) == REFUSAL


@pytest.mark.parametrize("form", FORMS[1:2], ids=str)
def test_a_cache_that_went_back_was_copied_or_restored_is_taken_too(
    form: CacheConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = Rows(320, 32, 1)
    expected = rows.reference(form)[:, :, 200:]
    refuse_slices(monkeypatch)
    first = whole(form)
    rows.run(first, [230])
    assert isinstance(first, QuantizedCache)
    assert first.trim(30) == 30
    (twin,) = fork([first])
    restored = make_layer_cache(form, 32, whole_codes=True)
    restored.restore(first.export(), 200)
    first.compact()
    for cache in (first, twin, restored):
        found = rows.run(cache, [1, 60, *[1] * 20, 39], start=200)
        np.testing.assert_allclose(found, expected, rtol=0, atol=3e-5)


def test_there_is_no_room_beside_the_codes() -> None:
    cache = make_layer_cache(CacheConfig(8, 8), 32, whole_codes=True)
    cache.expect(3000)
    kv = mx.zeros((1, 2, 500, 32))
    cache.update_and_fetch(kv, kv)
    words = [array for array in cache.state if array.dtype == mx.uint32]
    assert [array.shape for array in words] == [(1, 2, 416, 8)] * 2
