"""Prompt caches on disk: they continue with the same tokens, and nothing else is accepted."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner

from apertus_mlx.backend.metal.compiled_step import CompiledStep
from apertus_mlx.backend.mlx import load_inventory
from apertus_mlx.backend.ranks import Ranks
from apertus_mlx.cache import FULL_PRECISION, CacheConfig
from apertus_mlx.checkpoint.inventory import take_inventory
from apertus_mlx.cli.app import app
from apertus_mlx.errors import NotFoundError, RejectedError, ResourceError, UsageError
from apertus_mlx.generation.cached_prefix import CachedPrefix
from apertus_mlx.generation.decode import draw_tokens
from apertus_mlx.generation.prompt_cache import (
    Fingerprint,
    PromptCache,
    fingerprint,
    load_prompt_cache,
    save_prompt_cache,
)
from apertus_mlx.generation.sampling import Sampler, SamplingParams
from apertus_mlx.model.apertus import Model
from apertus_mlx.model.split import part_of
from apertus_mlx.model.stages import stage_of
from tests.builders import config_4x, random_weights, write_checkpoint, write_json
from tests.cache_sequences import layers_of
from tests.daily import every
from tests.decode_step import JoinedPlain
from tests.links import Wire

pytestmark = pytest.mark.gpu

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


def greedy(prefix: CachedPrefix, prompt: list[int], count: int = 30) -> list[int]:
    run = prefix.begin(prompt)
    sampler = Sampler(SamplingParams(temperature=0), [], 384)
    return list(draw_tokens(run.step, run.read(step=64), sampler, count))


def read(model: Model, tokens: list[int], form: CacheConfig) -> CachedPrefix:
    """A prefix that holds `tokens`, read in chunks."""
    prefix = CachedPrefix(model, form)
    prefix.begin(tokens).read(step=64)
    return prefix


def resume(path: Path, model: Model, form: CacheConfig, now: Fingerprint) -> CachedPrefix:
    saved = load(path, model, form, now)
    prefix = CachedPrefix(model, form)
    prefix.restore(saved.tokens, saved.layers)
    return prefix


def test_a_machine_of_several_has_a_file_for_its_part(directory: Path, tmp_path: Path) -> None:
    whole = take_inventory(directory)
    part = stage_of(whole, range(1, 2), 1, 2)
    wire = cast(Ranks, Wire(1, 2, [mx.random.normal((1, 30, whole.config.hidden_size))]))
    model = load_inventory(part, "float32", ranks=wire)
    prefix = CachedPrefix(model)
    prefix.begin(TOKENS[:31]).read(30)
    path = tmp_path / "p"
    PromptCache(path, part, FULL_PRECISION, mx.float32).save(prefix)
    found = PromptCache(path, part, FULL_PRECISION, mx.float32)
    assert found.tokens == TOKENS[:30]
    resumed = found.resume(model, TOKENS[:31])
    for before, after in zip(prefix.export(), resumed.export(), strict=True):
        assert all(mx.array_equal(before[name], after[name]).item() for name in before)
    others = {
        "rank 0 of 2 with a share of each layer": part_of(whole, 2),
        "rank 1 of 3 with layers 1 to 1": stage_of(whole, range(1, 2), 1, 3),
        "one machine": whole,
    }
    for name, other in others.items():
        said = f"was made by rank 1 of 2 with layers 1 to 1, and this is {name}; delete it"
        with pytest.raises(RejectedError, match=re.escape(said)):
            PromptCache(path, other, FULL_PRECISION, mx.float32)


def load(path: Path, model: Model, form: CacheConfig, now: Fingerprint) -> Any:
    return load_prompt_cache(path, model.config, form, mx.float32, now)


@pytest.mark.parametrize("form", every(3, FORMS), ids=str)
def test_a_saved_cache_continues_with_the_same_tokens(
    form: CacheConfig, model: Model, now: Fingerprint, tmp_path: Path
) -> None:
    path = tmp_path / "prompt"
    prefix = read(model, TOKENS[:-20], form)
    save_prompt_cache(path, prefix, now)
    resumed = resume(path, model, form, now)
    assert resumed.tokens == prefix.tokens == TOKENS[:-20]
    assert [layer.nbytes for layer in layers_of(resumed)] == [
        layer.nbytes for layer in layers_of(prefix)
    ]
    assert greedy(resumed, TOKENS) == greedy(prefix, TOKENS)
    assert [file.name for file in tmp_path.iterdir()] == ["prompt"]


@pytest.mark.parametrize("form", [FULL_PRECISION, CacheConfig(4, 4)], ids=str)
def test_a_rewound_cache_can_be_saved(
    form: CacheConfig, model: Model, now: Fingerprint, tmp_path: Path
) -> None:
    prefix = read(model, TOKENS, form)
    prefix.cut(len(TOKENS) - 32)
    assert prefix.tokens == TOKENS[:-32]
    save_prompt_cache(tmp_path / "p", prefix, now)
    resumed = resume(tmp_path / "p", model, form, now)
    expected, got = (p.begin(TOKENS).read() for p in (prefix, resumed))
    assert mx.array_equal(got, expected).item()


@pytest.fixture(scope="module")
def written(model: Model, now: Fingerprint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "prompt.safetensors"
    save_prompt_cache(path, read(model, TOKENS, CacheConfig(4, 4)), now)
    return path


@pytest.fixture
def saved(written: Path, tmp_path: Path) -> Path:
    """A file that a test may change."""
    return shutil.copy(written, tmp_path / "prompt.safetensors")


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
        ({"format_version": "2"}, "format version '2', this program reads 3"),
        ({"format_version": "4"}, "format version '4'"),
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
        ({"form": "{}"}, "another form"),
        ({"form": "[]"}, "another form"),
        ({"form": '{"kind": "os.system"}'}, "another form"),
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


@pytest.mark.parametrize("value", every(3, [True, "4", None, 4.0, 10**30, -4]))
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
         "type F16, expected F32; probably it was made with another --dtype"),
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


@pytest.mark.parametrize(
    "extra", every(3, [("--max-kv", "180", "--kv-bits", "8"), (), ("--kv-bits", "4")])
)
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
    assert (first["reused_prompt_tokens"], again["reused_prompt_tokens"]) == (0, 250)
    assert again["token_ids"] == without["token_ids"]
    assert path.read_bytes() == stamp


def test_generate_refuses_another_prompt_or_place(directory: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompt"
    common = ("--raw", "--model", str(directory), "-t", "0", "-n", "2", "--prompt-cache")
    assert run("generate", "word " * 50, *common, str(path)).exit_code == 0
    other = run("generate", "b" * 300, *common, str(path))
    assert isinstance(other.exception, RejectedError)
    assert "tokens: its 250 differ" in str(other.exception)
    nowhere = run("generate", "hi", *common, str(tmp_path / "no" / "folder"))
    assert isinstance(nowhere.exception, UsageError)


def test_resuming_cuts_back_exactly_or_refuses(directory: Path, tmp_path: Path) -> None:
    inventory = take_inventory(directory)
    model = load_inventory(inventory)
    for form, back, works in ((FULL_PRECISION, 100, True), (CacheConfig(4, 4), 100, False)):
        path = tmp_path / str(form)
        PromptCache(path, inventory, form, mx.float32).save(read(model, TOKENS, form))
        resumed = PromptCache(path, inventory, form, mx.float32)
        prompt = [*TOKENS[:-back], 5, 6, 7]
        resumed.require_use(prompt)
        if works:
            assert resumed.resume(model, prompt).tokens == TOKENS[:-back]
        else:
            with pytest.raises(
                RejectedError, match=r"its first 130 of 230 .* 4 bits cannot go back"
            ):
                resumed.resume(model, prompt)


@pytest.mark.parametrize(
    "extra",
    every(4, [("--kv-bits", "4"), (), ("--max-kv", "150"), ("--max-kv", "220", "--kv-bits", "4")]),
)
def test_the_same_command_twice_says_the_same(
    directory: Path, tmp_path: Path, extra: tuple[str, ...]
) -> None:
    common = ("--raw", "--model", str(directory), "-t", "0", "-n", "12", "--json", *extra)
    once, twice = (
        json.loads(run("generate", "word " * 60, *common, "--prompt-cache", str(path)).stdout)
        for path in [tmp_path / "prompt"] * 2
    )
    assert (once["reused_prompt_tokens"], twice["reused_prompt_tokens"]) == (0, 300)
    assert once["token_ids"] == twice["token_ids"]
    fresh = json.loads(run("generate", "word " * 60, *common).stdout)
    assert twice["token_ids"] == fresh["token_ids"]


def test_a_resumed_cache_is_of_the_kind_that_the_model_makes(
    directory: Path, tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime")
    from apertus_mlx.backend.cpu.model import CPUModel

    inventory = take_inventory(directory)
    joined = load_inventory(inventory)
    joined.use(CompiledStep(JoinedPlain()))
    for index, model in enumerate((CPUModel(inventory), load_inventory(inventory), joined)):
        path = tmp_path / str(index)
        made = CachedPrefix(model)
        made.begin(TOKENS[:-1]).read()
        PromptCache(path, inventory, FULL_PRECISION, mx.float32).save(made)
        resumed = PromptCache(path, inventory, FULL_PRECISION, mx.float32).resume(model, TOKENS)
        for layer, wanted in zip(layers_of(resumed), model.make_cache(), strict=True):
            assert type(layer) is type(wanted)
            assert getattr(layer, "joined", None) == getattr(wanted, "joined", None)
        expected = model(mx.array([TOKENS]))[0, -1]
        got = resumed.begin(TOKENS).read()
        assert float(mx.abs(got - expected).max() / mx.abs(expected).max()) < 1e-5


def test_another_arithmetic_is_refused_by_name(tmp_path: Path) -> None:
    """A cache of rounded activations is not what a run in float32 would have computed."""
    pytest.importorskip("onnxruntime")
    config = config_4x(head_dim=64, quantization={"bits": 4, "group_size": 64})
    weights = {}
    for name, array in random_weights(config).items():
        stored = mx.quantize(mx.array(array), 64, 4) if array.ndim == 2 else [mx.array(array)]
        path = name.removesuffix(".weight")
        names = [f"{path}.{part}" for part in ("weight", "scales", "biases")]
        weights.update(zip(names if array.ndim == 2 else [name], stored, strict=True))
    folder = write_checkpoint(tmp_path / "model", config, weights)
    common = ("--raw", "--model", str(folder), "-t", "0", "-n", "3", "--prompt-cache")

    def again(path: Path, *options: str) -> Any:
        return run("generate", "word " * 20, *common, str(path), *options)

    ways = {
        "int8": ("--compute", "cpu", "--precision", "int8"),
        "float32": ("--compute", "cpu", "--precision", "float32"),
        "mlx": ("--compute", "mlx"),
        "half": ("--compute", "mlx", "--dtype", "bfloat16"),
    }
    for made_by in ("int8", "float32"):
        assert again(tmp_path / made_by, *ways[made_by]).exit_code == 0
    for made_by, asked in (
        ("int8", "float32"), ("float32", "int8"), ("float32", "mlx"), ("float32", "half"),
    ):  # fmt: skip
        found = again(tmp_path / made_by, *ways[asked])
        assert isinstance(found.exception, RejectedError), (made_by, asked)
        assert "--dtype" in str(found.exception)
    # What `auto` means at 4 bits.
    assert again(tmp_path / "int8", "--compute", "cpu").exit_code == 0


def test_a_link_stays_one_and_a_kill_leaves_nothing_for_long(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ("generate", "word", "--raw", "--model", str(directory), "-t", "0", "-n", "2")
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "prompt"
    link.symlink_to(tmp_path / "elsewhere" / "prompt")
    with monkeypatch.context() as patch:

        def killed(*_: Any, **__: Any) -> None:
            raise SystemExit

        # A kill runs no line of what would clear up.
        patch.setattr(mx, "save_safetensors", killed)
        patch.setattr(Path, "unlink", lambda *_, **__: None)
        run(*common, "--prompt-cache", str(link))
    assert len(list((tmp_path / "elsewhere").iterdir())) == 1
    for _ in range(2):
        assert run(*common, "--prompt-cache", str(link)).exit_code == 0
        assert link.is_symlink()
        assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["prompt"]
    assert {path.name for path in tmp_path.iterdir()} == {"elsewhere", "prompt"}


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def save(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(mx, "save_safetensors", save)


@pytest.fixture
def read_only_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *_: Any, **__: Any) -> Any:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    def open_(self: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        return (refuse if "w" in mode else original)(self, mode, *arguments, **options)

    def open_descriptor(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
        if flags & os.O_CREAT:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return open_any(path, flags, *arguments, **options)

    original, open_any = Path.open, os.open
    monkeypatch.setattr(Path, "open", open_)
    monkeypatch.setattr(os, "open", open_descriptor)
    monkeypatch.setattr(Path, "unlink", refuse)


@pytest.mark.parametrize("disk", ["full_disk", "read_only_disk"])
def test_a_disk_that_cannot_be_written_costs_no_answer(
    disk: str, directory: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    common = ("generate", "word", "--raw", "--model", str(directory), "-t", "0", "-n", "9")
    expected = run(*common).stdout
    request.getfixturevalue(disk)
    found = run(*common, "--prompt-cache", str(tmp_path / "prompt"))
    assert found.stdout == expected
    assert isinstance(found.exception, ResourceError)
    assert "prompt: cannot be written (" in str(found.exception)
    assert not list(tmp_path.iterdir())
