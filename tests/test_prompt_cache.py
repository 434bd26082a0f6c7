"""Prompt caches on disk: they continue with the same tokens, and nothing else is accepted."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from builders import config_4x, random_weights, write_checkpoint, write_json
from safetensors.numpy import save_file
from typer.testing import CliRunner

from apertus_mlx.cache import FULL_PRECISION, CacheConfig
from apertus_mlx.cli.app import app
from apertus_mlx.decode import decode, prefill
from apertus_mlx.errors import NotFoundError, RejectedError, UsageError
from apertus_mlx.inventory import take_inventory
from apertus_mlx.load import load_inventory
from apertus_mlx.model import Model
from apertus_mlx.prompt_cache import (
    Fingerprint,
    PromptCache,
    fingerprint,
    load_prompt_cache,
    save_prompt_cache,
)
from apertus_mlx.sampling import Sampler, SamplingParams

TOKENS = [(11 * i * i + 5 * i) % 380 for i in range(230)]
FORMS = [
    FULL_PRECISION,
    CacheConfig(bound=100),
    CacheConfig(bound=300),
    CacheConfig(8, 8),
    CacheConfig(3, 6, rotate=False),
    CacheConfig(4, 16),
    CacheConfig(4, 4, bound=200),
    CacheConfig(2, 2, sinks=0, window=0),
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = config_4x(head_dim=64)
    return write_checkpoint(tmp_path_factory.mktemp("model"), config, random_weights(config))


@pytest.fixture(scope="module")
def model(directory: Path) -> Model:
    return load_inventory(take_inventory(directory))


@pytest.fixture(scope="module")
def now(directory: Path) -> Fingerprint:
    return fingerprint(take_inventory(directory))


def greedy(model: Model, logits: mx.array, caches: list[Any], count: int = 30) -> list[int]:
    sampler = Sampler(SamplingParams(temperature=0), [], 384)
    return list(decode(model, logits, caches, sampler, count))


def load(path: Path, model: Model, form: CacheConfig, now: Fingerprint) -> Any:
    return load_prompt_cache(path, model.config, form, mx.float32, now)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_saved_cache_continues_with_the_same_tokens(
    form: CacheConfig, model: Model, now: Fingerprint, tmp_path: Path
) -> None:
    path = tmp_path / "prompt"
    caches = model.make_cache(form)
    prefill(model, TOKENS[:-20], caches, 64)
    save_prompt_cache(path, caches, form, TOKENS[:-20], now)
    saved = load(path, model, form, now)
    assert saved.tokens == TOKENS[:-20]
    assert [cache.nbytes for cache in saved.caches] == [cache.nbytes for cache in caches]
    expected = greedy(model, prefill(model, TOKENS[-20:], caches, 64), caches)
    got = greedy(model, prefill(model, TOKENS[-20:], saved.caches, 64), saved.caches)
    assert got == expected
    assert [file.name for file in tmp_path.iterdir()] == ["prompt"]


@pytest.mark.parametrize("form", [FULL_PRECISION, CacheConfig(4, 4)], ids=str)
def test_a_rewound_cache_can_be_saved(
    form: CacheConfig, model: Model, now: Fingerprint, tmp_path: Path
) -> None:
    caches = model.make_cache(form)
    prefill(model, TOKENS, caches, 64)
    assert [cache.trim(32) for cache in caches] == [32] * len(caches)
    save_prompt_cache(tmp_path / "p", caches, form, TOKENS[:-32], now)
    saved = load(tmp_path / "p", model, form, now)
    expected = model(mx.array([TOKENS[-32:]]), caches)
    got = model(mx.array([TOKENS[-32:]]), saved.caches)
    assert mx.array_equal(got, expected).item()


@pytest.fixture
def saved(model: Model, now: Fingerprint, tmp_path: Path) -> Path:
    path = tmp_path / "prompt.safetensors"
    caches = model.make_cache(CacheConfig(4, 4))
    prefill(model, TOKENS, caches, 64)
    save_prompt_cache(path, caches, CacheConfig(4, 4), TOKENS, now)
    return path


def rewrite(
    path: Path,
    metadata: Callable[[dict[str, str]], object] = lambda _: None,
    arrays: Callable[[dict[str, mx.array]], object] = lambda _: None,
) -> None:
    """Change a file as someone would who knows the format."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    texts = json.loads(content[8 : 8 + length])["__metadata__"]
    held = mx.load(str(path))
    assert isinstance(held, dict)
    metadata(texts)
    arrays(held)
    mx.save_safetensors(str(path), held, texts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "is not a prompt cache"),
        ({"format_version": "0"}, "format version '0', this program reads 1"),
        ({"format_version": "2"}, "format version '2'"),
        ({"model": "0" * 64}, "another model"),
        ({"weights": "0" * 64}, "another revision of the weights"),
        ({"quantization": "0" * 64}, "another quantization"),
        ({"template": "0" * 64}, "another tokenizer or chat template"),
        ({"tokens": "0" * 64}, "tokens do not match"),
        ({"positions": "-1"}, "positions '-1'"),
        ({"positions": "0"}, "positions '0'"),
        ({"positions": "99999999999999999999"}, "positions '9999"),
        ({"positions": "513"}, "expected 1 to 512"),
        ({"positions": "231"}, "shape"),
        ({"positions": "100"}, "shape"),
        ({"positions": "\u0663"}, "positions"),
        ({"form": "{}"}, "form: not one"),
        ({"form": "[]"}, "form"),
        ({"form": '{"kind": "os.system"}'}, "form: not one"),
    ],
)
def test_other_conditions_are_refused_by_name(
    change: dict[str, str], message: str, saved: Path, model: Model, now: Fingerprint
) -> None:
    rewrite(saved, metadata=lambda texts: texts.update(change))
    with pytest.raises(RejectedError, match=message) as refused:
        load(saved, model, CacheConfig(4, 4), now)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "form", [FULL_PRECISION, CacheConfig(4, 3), CacheConfig(4, 4, bound=300)], ids=str
)
def test_another_form_is_refused(
    form: CacheConfig, saved: Path, model: Model, now: Fingerprint
) -> None:
    with pytest.raises(RejectedError, match="holds a cache of another form"):
        load(saved, model, form, now)


@pytest.mark.parametrize("value", [True, "4", None, 4.0, 10**30, -4])
@pytest.mark.parametrize("key", ["key_bits", "bound", "sinks", "rotate"])
def test_a_form_of_other_types_is_refused(
    key: str, value: object, saved: Path, model: Model, now: Fingerprint
) -> None:
    def change(texts: dict[str, str]) -> None:
        texts["form"] = json.dumps({**json.loads(texts["form"]), key: value})

    rewrite(saved, metadata=change)
    if key in ("bound", "rotate") and value is None:
        assert load(saved, model, CacheConfig(4, 4), now).tokens == TOKENS
        return
    with pytest.raises(RejectedError):
        load(saved, model, CacheConfig(4, 4), now)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda held: held.pop("layers.1.keys.scales"), "layers.1.keys.scales is missing"),
        (lambda held: held.pop("tokens"), "tokens is missing"),
        (lambda held: held.update(more=mx.zeros((3,))), "unexpected array 'more'"),
        (lambda held: held.update({"layers.2.recent": held["layers.0.recent"]}), "unexpected"),
        (lambda held: held.update({"layers.0.recent": held["layers.0.recent"][:, :, 1:]}),
         "layers.0.recent: shape"),
        (lambda held: held.update({"layers.0.recent": held["layers.0.recent"].astype(mx.float16)}),
         "type F16, expected F32; made with another --dtype"),
        (lambda held: held.update({"layers.0.recent": held["layers.0.recent"] * math.nan}),
         "not finite"),
        (lambda held: held.update(tokens=held["tokens"][::-1]), "tokens do not match"),
    ],
)  # fmt: skip
def test_other_arrays_are_refused_by_name(
    change: Callable[[dict[str, mx.array]], object],
    message: str,
    saved: Path,
    model: Model,
    now: Fingerprint,
) -> None:
    rewrite(saved, arrays=change)
    with pytest.raises(RejectedError, match=message):
        load(saved, model, CacheConfig(4, 4), now)


def test_damaged_files_are_refused(
    saved: Path, model: Model, now: Fingerprint, tmp_path: Path
) -> None:
    whole = saved.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    damaged = {
        "empty": b"",
        "truncated": whole[:-1],
        "longer": whole + b"\0",
        "half a header": whole[: length // 2],
        "huge header": (2**60).to_bytes(8, "little") + whole[8:],
        "no JSON": whole[:8] + b"x" * length + whole[8 + length :],
        "offset": whole.replace(b'"data_offsets":[0,', b'"data_offsets":[8,', 1),
        "negative offset": whole.replace(b'"data_offsets":[0,', b'"data_offsets":[-,', 1),
        "text": b"Dear sir or madam, this is no prompt cache",
    }
    for name, content in damaged.items():
        assert content != whole
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(RejectedError):
            load(path, model, CacheConfig(4, 4), now)
    with pytest.raises(NotFoundError):
        load(tmp_path / "absent", model, CacheConfig(4, 4), now)
    save_file({"x": np.zeros(3, np.float32)}, tmp_path / "weights.safetensors")
    with pytest.raises(RejectedError, match="is not a prompt cache"):
        load(tmp_path / "weights.safetensors", model, CacheConfig(4, 4), now)


def test_mlx_lms_prompt_caches_are_refused(model: Model, now: Fingerprint, tmp_path: Path) -> None:
    theirs = pytest.importorskip("mlx_lm.models.cache")
    caches = [theirs.KVCache() for _ in model.layers]
    model(mx.array([TOKENS]), caches)
    theirs.save_prompt_cache(str(tmp_path / "theirs.safetensors"), caches)
    with pytest.raises(RejectedError, match="is not a prompt cache"):
        load(tmp_path / "theirs.safetensors", model, FULL_PRECISION, now)


def test_fingerprints_tell_apart_what_matters(directory: Path, tmp_path: Path) -> None:
    def changed(name: str, change: Callable[[Path], object]) -> Fingerprint:
        copy = tmp_path / name
        shutil.copytree(directory, copy)
        change(copy)
        return fingerprint(take_inventory(copy))

    config = json.loads((directory / "config.json").read_text())
    same = fingerprint(take_inventory(directory))
    assert changed("same", lambda folder: (folder / "README.md").write_text("hello")) == same
    theta = changed("theta", lambda f: write_json(f / "config.json", config | {"rope_theta": 1e4}))
    assert theta == replace(same, model=theta.model) != same
    other = random_weights(config, seed=9)
    weights = changed("weights", lambda f: write_checkpoint(f, config, other, tokenizer=False))
    assert weights == replace(same, weights=weights.weights) != same
    template = changed("template", lambda f: (f / "chat_template.jinja").write_text("{{ x }}"))
    assert template == replace(same, template=template.template) != same


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


@pytest.mark.parametrize("extra", [(), ("--kv-bits", "4"), ("--max-kv", "180", "--kv-bits", "8")])
def test_generate_makes_and_resumes_a_prompt_cache(
    directory: Path, tmp_path: Path, extra: tuple[str, ...]
) -> None:
    path = tmp_path / "prompt"
    prompt = "word " * 50
    common = ("--raw", "--model", str(directory), "-t", "0", "-n", "12", "--json", *extra)
    plain = json.loads(run("generate", prompt, *common).stdout)
    first = json.loads(run("generate", prompt, *common, "--prompt-cache", str(path)).stdout)
    stamp = path.read_bytes()
    again = json.loads(
        run("generate", prompt + "and on", *common, "--prompt-cache", str(path)).stdout
    )
    without = json.loads(run("generate", prompt + "and on", *common).stdout)
    assert first["token_ids"] == plain["token_ids"]
    assert (first["reused_prompt_tokens"], again["reused_prompt_tokens"]) == (0, 251)
    assert again["token_ids"] == without["token_ids"]
    assert path.read_bytes() == stamp


def test_generate_refuses_another_prompt_or_place(directory: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompt"
    common = ("--raw", "--model", str(directory), "-t", "0", "-n", "2", "--prompt-cache")
    assert run("generate", "word " * 50, *common, str(path)).exit_code == 0
    other = run("generate", "b" * 300, *common, str(path))
    assert isinstance(other.exception, RejectedError)
    assert "tokens: its 251 differ" in str(other.exception)
    nowhere = run("generate", "hi", *common, str(tmp_path / "no" / "folder"))
    assert isinstance(nowhere.exception, UsageError)


def test_resuming_cuts_back_exactly_or_refuses(directory: Path, tmp_path: Path) -> None:
    inventory = take_inventory(directory)
    model = load_inventory(inventory)
    for form, back, works in ((FULL_PRECISION, 100, True), (CacheConfig(4, 4), 100, False)):
        path = tmp_path / str(form)
        caches = model.make_cache(form)
        prefill(model, TOKENS, caches, 64)
        PromptCache(path, inventory, form, mx.float32).save(caches, TOKENS)
        resumed = PromptCache(path, inventory, form, mx.float32)
        prompt = [*TOKENS[:-back], 5, 6, 7]
        if works:
            found, shared = resumed.resume(prompt)
            assert found is not None
            assert (shared, found[0].offset) == (len(TOKENS) - back, len(TOKENS) - back)
        else:
            with pytest.raises(RejectedError, match="tokens"):
                resumed.resume(prompt)
