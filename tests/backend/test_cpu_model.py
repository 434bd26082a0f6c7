"""The CPU path beside the plain form: equal logits for every format, cache form and chunking."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from apertus_mlx.backend.hardware import processors
from apertus_mlx.backend.mlx import load_model
from apertus_mlx.cache import Cache, CacheConfig, FullCache, rewind
from apertus_mlx.checkpoint.inventory import take_inventory
from apertus_mlx.errors import RejectedError
from apertus_mlx.generation.decode import decode, prefill
from apertus_mlx.generation.sampling import Sampler, SamplingParams
from apertus_mlx.model.apertus import Model
from apertus_mlx.quant.spec import AFFINE_BITS, AFFINE_GROUP_SIZES, FLOAT_MODES
from tests.builders import config_4x, random_weights, write_checkpoint
from tests.daily import every, every_row
from tests.parity_cases import CASES

pytest.importorskip("onnxruntime")
from apertus_mlx.backend.cpu.cache import CPUCache
from apertus_mlx.backend.cpu.model import CPUModel
from apertus_mlx.backend.cpu.threads import THREADS_VARIABLE

# Of the logits' largest absolute value.
TOLERANCE = 1e-5
WIDE = config_4x(hidden_size=128, intermediate_size=256, num_attention_heads=4)
IDS = mx.array([[1, 65, 74, 150, 233, 80, 201, 99, 77, 310, 66, 67, 5, 9, 11, 380, 0, 12, 40]])
FORMS = {
    "full": CacheConfig(),
    "bounded": CacheConfig(bound=12),
    "8 bits": CacheConfig(key_bits=8, value_bits=8, window=0),
    "4 bits, bounded": CacheConfig(key_bits=4, value_bits=4, window=0, sinks=2, bound=100),
}


def quantize(weights: dict[str, np.ndarray], specs: dict[str, Any]) -> dict[str, Any]:
    """Weights in MLX's format; the spec whose name a path ends with, else the one named ''."""
    stored: dict[str, Any] = {}
    for name, array in weights.items():
        path = name.removesuffix(".weight")
        if array.ndim != 2:
            stored[name] = array
            continue
        spec = next((specs[key] for key in specs if key and path.endswith(key)), specs[""])
        parts = mx.quantize(mx.array(array), **spec)
        for suffix, part in zip(("weight", "scales", "biases"), parts, strict=False):
            stored[f"{path}.{suffix}"] = part
    return stored


def write_quantized(folder: Path, config: dict[str, Any], specs: dict[str, Any]) -> Path:
    """A checkpoint with each matrix quantized as `specs` say."""
    weights = random_weights(config)
    block = dict(specs[""])
    for path in (name.removesuffix(".weight") for name in weights):
        for ending, spec in specs.items():
            if ending and path.endswith(ending):
                block[path] = spec
    return write_checkpoint(
        folder, {**config, "quantization": block}, quantize(weights, specs), tokenizer=False
    )


def both(folder: Path) -> tuple[Model, CPUModel]:
    return load_model(folder, "float32"), CPUModel(take_inventory(folder), "float32")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, CPUModel]:
    spec = {"": {"bits": 4, "group_size": 64}}
    return both(write_quantized(tmp_path_factory.mktemp("pair"), WIDE, spec))


def require_equal(found: mx.array, expected: mx.array) -> None:
    a, b = np.array(found), np.array(expected)
    assert a.shape == b.shape
    assert np.abs(a - b).max() <= TOLERANCE * np.abs(b).max()


def in_chunks(model: Any, ids: mx.array, sizes: Sequence[int], cache: list[Cache]) -> mx.array:
    parts, start = [], 0
    for size in sizes:
        parts.append(model(ids[:, start : start + size], cache))
        start += size
    assert start == ids.shape[1]
    return mx.concatenate(parts, axis=1)


@pytest.mark.parametrize("name", every(2, CASES))
def test_geometries(name: str, tmp_path: Path) -> None:
    config, shards = CASES[name]
    plain, cpu = both(write_checkpoint(tmp_path, config, shards=shards, tokenizer=False))
    require_equal(cpu(IDS), plain(IDS))
    sizes = (7, 1, 11)
    require_equal(
        in_chunks(cpu, IDS, sizes, cpu.make_cache()),
        in_chunks(plain, IDS, sizes, plain.make_cache()),
    )


@pytest.mark.parametrize(
    ("bits", "group_size", "tied"),
    every_row(7, product(AFFINE_BITS, AFFINE_GROUP_SIZES, [False, True])),
)
def test_affine(bits: int, group_size: int, tied: bool, tmp_path: Path) -> None:
    config = {**WIDE, "tie_word_embeddings": tied}
    plain, cpu = both(
        write_quantized(tmp_path, config, {"": {"bits": bits, "group_size": group_size}})
    )
    require_equal(cpu(IDS), plain(IDS))


@pytest.mark.parametrize("mode", FLOAT_MODES)
def test_floating_point_modes(mode: str, tmp_path: Path) -> None:
    bits, group_size = FLOAT_MODES[mode]
    spec = {"": {"bits": bits, "group_size": group_size, "mode": mode}}
    plain, cpu = both(write_quantized(tmp_path, WIDE, spec))
    require_equal(cpu(IDS), plain(IDS))


def test_mixed_formats(tmp_path: Path) -> None:
    specs = {
        "": {"bits": 3, "group_size": 64},
        "v_proj": {"bits": 6, "group_size": 64},
        "down_proj": {"bits": 8, "group_size": 32},
        "embed_tokens": {"bits": 4, "group_size": 32},
    }
    plain, cpu = both(write_quantized(tmp_path, WIDE, specs))
    require_equal(cpu(IDS), plain(IDS))


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_sixteen_bit_checkpoints(dtype: mx.Dtype, tmp_path: Path) -> None:
    plain, cpu = both(write_checkpoint(tmp_path, WIDE, dtype=dtype, tokenizer=False))
    require_equal(cpu(IDS), plain(IDS))


@pytest.mark.parametrize("sizes", [(19,), (1,) * 19, (3, 1, 1, 8, 6), (17, 2)], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_cache_forms_and_chunkings(
    form: str, sizes: Sequence[int], pair: tuple[Model, CPUModel]
) -> None:
    caches = [model.make_cache(FORMS[form]) for model in pair]
    expected, found = (
        in_chunks(model, IDS, sizes, cache) for model, cache in zip(pair, caches, strict=True)
    )
    require_equal(found, expected)
    assert [cache.offset for cache in caches[1]] == [19, 19]
    assert isinstance(caches[1][0], CPUCache) == (form == "full")


def test_long_chunks_and_growth(pair: tuple[Model, CPUModel]) -> None:
    ids = mx.random.randint(0, 384, (1, 700), key=mx.random.key(3))
    plain, cpu = pair
    expected = plain(ids, plain.make_cache())
    require_equal(in_chunks(cpu, ids, (600, 99, 1), cpu.make_cache()), expected)
    foreign: list[Cache] = [FullCache() for _ in cpu.layers]
    require_equal(in_chunks(cpu, ids, (600, 99, 1), foreign), expected)


def test_batches(pair: tuple[Model, CPUModel]) -> None:
    plain, cpu = pair
    ids = mx.random.randint(0, 384, (3, 9), key=mx.random.key(4))
    require_equal(cpu(ids), plain(ids))
    for form in FORMS.values():
        caches = [model.make_cache(form) for model in pair]
        for part in (ids[:, :5], ids[:, 5:6], ids[:, 6:]):
            require_equal(cpu(part, caches[1]), plain(part, caches[0]))


def test_rewinding(pair: tuple[Model, CPUModel]) -> None:
    _, cpu = pair
    cache = cpu.make_cache()
    cpu(IDS, cache)
    assert rewind(cache, 7)
    assert cache[0].offset == 12
    require_equal(cpu(IDS[:, 12:], cache), cpu(IDS)[:, 12:])


def test_export_and_restore(pair: tuple[Model, CPUModel]) -> None:
    """Positions move between this cache and the plain one."""
    plain, cpu = pair
    ours, theirs = cpu.make_cache(), plain.make_cache()
    cpu(IDS[:, :12], ours)
    for mine, other in zip(ours, theirs, strict=True):
        assert isinstance(mine, CPUCache) and isinstance(other, FullCache)
        other.restore(mine.export(), 12)
    again = cpu.make_cache()
    for mine, other in zip(again, theirs, strict=True):
        assert isinstance(mine, CPUCache) and isinstance(other, FullCache)
        mine.restore(other.export(), 12)
    expected = plain(IDS)[:, 12:]
    require_equal(plain(IDS[:, 12:], theirs), expected)
    require_equal(cpu(IDS[:, 12:], again), expected)
    assert again[0].nbytes > 0 and CPUCache().nbytes == 0


def test_hidden_states_and_slices(pair: tuple[Model, CPUModel]) -> None:
    plain, cpu = pair
    hidden = cpu.model(IDS)
    require_equal(hidden, plain.model(IDS))
    require_equal(cpu.logits(hidden[:, ::-3]), plain.logits(hidden[:, ::-3]))
    require_equal(cpu(IDS[:, ::2]), plain(IDS[:, ::2]))


def test_decoding(pair: tuple[Model, CPUModel]) -> None:
    def text(model: Any) -> list[int]:
        cache = model.make_cache()
        sampler = Sampler(SamplingParams(temperature=0), (), 384)
        logits = prefill(model, IDS[0].tolist(), cache, 8)
        return list(decode(model, logits, cache, sampler, 40))

    assert text(pair[1]) == text(pair[0])


def test_two_models_and_two_threads(pair: tuple[Model, CPUModel], tmp_path: Path) -> None:
    other = CPUModel(take_inventory(write_checkpoint(tmp_path, config_4x(), tokenizer=False)))
    models = [pair[1], other]
    ids = mx.random.randint(0, 384, (1, 40), key=mx.random.key(5))
    expected = [np.array(model(ids)) for model in models]
    found: dict[int, list[np.ndarray]] = {0: [], 1: []}

    def work(index: int) -> None:
        tokens = np.array(ids)
        for _ in range(5):
            hidden = models[index]._hidden(mx.array(tokens), None)
            found[index].append(hidden)

    threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, model in enumerate(models):
        assert len(found[index]) == 5
        for hidden in found[index]:
            logits = model.logits(mx.array(hidden)[None])
            np.testing.assert_allclose(np.array(logits), expected[index], atol=1e-4)


FORK = """
import os, sys
from pathlib import Path
import mlx.core as mx
import numpy as np
from apertus_mlx.backend.cpu.model import CPUModel
from apertus_mlx.errors import ApertusError
from apertus_mlx.checkpoint.inventory import take_inventory
model = CPUModel(take_inventory(Path(sys.argv[1])))
ids = mx.array([[1, 2, 3]])
mx.eval(ids)
long = mx.arange(300)[None]
np.save(sys.argv[2], np.array(model(long)))
child = os.fork()
if child == 0:
    try:
        model._head({})
    except ApertusError as error:
        os._exit(7 if "fork" in str(error) else 1)
    os._exit(1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
model(ids)
print("both answered")
"""


def test_a_process_of_several_threads(tmp_path: Path) -> None:
    """Those of onnxruntime share the work; one that was forked from it is refused."""
    folder = write_checkpoint(tmp_path / "model", config_4x(), tokenizer=False)
    logits = tmp_path / "logits.npy"
    run = subprocess.run(
        [sys.executable, "-c", FORK, str(folder), str(logits)],
        env={**os.environ, THREADS_VARIABLE: str(min(2, processors()))},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.stdout == "both answered\n", run.stderr
    plain = np.array(load_model(folder)(mx.arange(300)[None]))
    np.testing.assert_allclose(np.load(logits), plain, atol=TOLERANCE * np.abs(plain).max(), rtol=0)


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    weights = random_weights(WIDE)
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = np.nan
    folder = write_checkpoint(tmp_path, WIDE, weights, tokenizer=False)
    with pytest.raises(RejectedError, match=r"layers\.1\.mlp\.up_proj\.weight: 1 value is not"):
        CPUModel(take_inventory(folder))


def test_eps_that_matters(tmp_path: Path) -> None:
    weights = random_weights(WIDE)
    weights["model.layers.0.mlp.act_fn.eps"][...] = -0.1
    folder = write_checkpoint(tmp_path, WIDE, weights, tokenizer=False)
    with pytest.raises(RejectedError, match="eps"):
        CPUModel(take_inventory(folder))


def divergence(reference: mx.array, other: mx.array) -> float:
    """Mean Kullback-Leibler divergence in nats over the positions, in float64."""
    p, q = (
        (lambda x: x - np.logaddexp.reduce(x, axis=-1, keepdims=True))(np.array(x, np.float64))
        for x in (reference, other)
    )
    return float(np.mean(np.sum(np.exp(p) * (p - q), axis=-1)))


@pytest.mark.parametrize("raw_alphas", [(0.2, -1.05), (166.0, 40.75)], ids=str)
def test_int8_activations_with_extreme_slopes(
    raw_alphas: tuple[float, float], tmp_path: Path
) -> None:
    """What they add stays below a tenth of the loss of 4 bits, also where xIELU amplifies it."""
    config = {**WIDE, "num_hidden_layers": 4}
    weights = random_weights(config)
    for name in weights:
        for suffix, value in zip(("alpha_p", "alpha_n"), raw_alphas, strict=True):
            if name.endswith(suffix):
                weights[name][...] = value
    full = load_model(write_checkpoint(tmp_path / "full", config, weights, tokenizer=False))
    spec = {"": {"bits": 4, "group_size": 64}}
    block = {**config, "quantization": spec[""]}
    folder = write_checkpoint(tmp_path / "4", block, quantize(weights, spec), tokenizer=False)
    inventory = take_inventory(folder)
    ids = mx.random.randint(0, 384, (1, 128), key=mx.random.key(6))
    exact, rounded = (CPUModel(inventory, kind)(ids) for kind in ("float32", "int8"))
    own, added = divergence(full(ids), exact), divergence(exact, rounded)
    print(f"alphas {raw_alphas}: 4 bits {own:.2e} nats, int8 activations add {added:.2e}")
    assert added < own / 10
