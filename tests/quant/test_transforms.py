"""`convert --smooth --rotate`: other weights of the same model, in the same form."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from apertus_mlx.backend.mlx import load_model
from apertus_mlx.checkpoint import layout
from apertus_mlx.cli.app import app
from apertus_mlx.convert.check.verify import verify
from apertus_mlx.convert.evaluation.layerwise import Weights, open_weights
from apertus_mlx.convert.job import convert, prepare
from apertus_mlx.convert.plan.policy import Request
from apertus_mlx.convert.sources.reading import Reader
from apertus_mlx.convert.transforms.names import NORM_READERS, VALUES, value_owners
from apertus_mlx.convert.transforms.smoothing import smoothing_scales
from apertus_mlx.convert.transforms.weights import Rotated, Scaled
from apertus_mlx.convert.write.manifest import MANIFEST
from apertus_mlx.errors import ApertusError, UsageError
from apertus_mlx.quant.affine import dequantize, fit
from apertus_mlx.quant.arrays import Float32, Float64
from apertus_mlx.quant.spec import QuantSpec
from apertus_mlx.quant.transforms import balance, choose_scales, make_rotation
from tests.builders import config_4x, random_weights, write_checkpoint
from tests.daily import every

IDS = np.random.default_rng(3).integers(74, 300, (2, 24))
# Tied and untied; grouped-query attention with heads of 64 and 128; a width with an odd factor.
SHAPES: dict[str, dict[str, Any]] = {
    "tied": {"tie_word_embeddings": True},
    "untied": {},
    "tied, 64": {"tie_word_embeddings": True, "hidden_size": 256},
    "untied, 128": {"hidden_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1},
    "untied, odd": {"hidden_size": 96, "intermediate_size": 160, "num_key_value_heads": 4},
}


@pytest.fixture(params=every(2, SHAPES))
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "source", config_4x(**SHAPES[request.param]))


@pytest.fixture
def untied(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "untied", config_4x(), dtype=mx.bfloat16)


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    config = config_4x(tie_word_embeddings=True)
    return write_checkpoint(tmp_path / "tied", config, dtype=mx.bfloat16)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "en.txt"
    lines = [f"Line {n} has {n * n} birds, and the sea is calm today." for n in range(60)]
    path.write_text("\n\n".join(lines))
    return path


def our_logits(folder: Path) -> Float64:
    return np.array(load_model(folder, "float32")(mx.array(IDS)), np.float64)


def their_logits(folder: Path) -> Float64:
    utils = pytest.importorskip("mlx_lm.utils")
    model, _ = utils.load_model(folder)
    model.set_dtype(mx.float32)
    return np.array(model(mx.array(IDS)), np.float64)


def off(found: Float64, expected: Float64) -> float:
    """The largest difference as a share of the largest logit."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def tensors(folder: Path) -> dict[str, mx.array]:
    return dict(mx.load(str(folder / "model.safetensors")))  # type: ignore[arg-type]


def write_weights(directory: Path, config: Mapping[str, Any], weights: Weights) -> Path:
    """A checkpoint of whatever `weights` yields."""
    paths = [matrix.path for matrix in layout.matrices(weights.config)]
    arrays = {f"{path}.weight": weights.matrix(path) for path in paths}
    arrays |= {name: weights.vector(name) for name, _ in layout.vectors(weights.config)}
    return write_checkpoint(directory, config, arrays)


def with_outliers(config: Mapping[str, Any], factor: float = 30.0) -> dict[str, np.ndarray]:
    """A model in which a few channels of norms and values are large and their readers small."""
    rng = np.random.default_rng(5)
    weights = random_weights(config)
    size = config["hidden_size"] // config["num_attention_heads"]
    for index in range(config["num_hidden_layers"]):
        prefix = layout.layer(index)
        for norm, readers in NORM_READERS.items():
            channels = rng.choice(config["hidden_size"], 3, replace=False)
            weights[f"{prefix}.{norm}"][channels] *= factor
            for reader in readers:
                weights[f"{prefix}.{reader}.weight"][:, channels] /= factor
        for channel in rng.choice(size, 2, replace=False):
            values = weights[f"{prefix}.self_attn.v_proj.weight"]
            values.reshape(-1, size, values.shape[1])[:, channel] *= factor
            outputs = weights[f"{prefix}.self_attn.o_proj.weight"]
            outputs.reshape(len(outputs), -1, size)[:, :, channel] /= factor
    return weights


# --- numbers ---


@pytest.mark.parametrize("size", [1, 2, 3, 64, 96, 100, 128, 1024])
def test_rotations_are_orthogonal(size: int) -> None:
    rotation = make_rotation(size, 0)
    dense = rotation.columns(np.eye(size, dtype=np.float32)).astype(np.float64)
    assert np.abs(dense @ dense.T - np.eye(size)).max() < 1e-6
    weight = np.random.default_rng(0).standard_normal((5, size)).astype(np.float32)
    assert np.abs(rotation.columns(weight) - weight @ dense).max() < 1e-5
    assert np.abs(rotation.rows(weight.T) - dense.T @ weight.T).max() < 1e-5


def test_powers_of_two_spread_evenly() -> None:
    """A single outlier ends up as large in every column."""
    for size in (64, 4096):
        row = np.zeros((1, size), np.float32)
        row[0, 7] = 1
        assert np.allclose(np.abs(make_rotation(size, 0).columns(row)), size**-0.5)


def test_seeds_differ_and_repeat() -> None:
    weight = np.eye(32, dtype=np.float32)
    first, again, other = (make_rotation(32, seed).columns(weight) for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.allclose(first, other)


def test_balance_makes_both_sides_alike() -> None:
    rng = np.random.default_rng(0)
    giver = (rng.standard_normal((4, 9)) * [[1], [50], [0.02], [3]]).astype(np.float32)
    reader = rng.standard_normal((6, 8)).astype(np.float32)
    owners = np.array([0, 1, 0, 1, 2, 3, 2, 3])
    scales = balance(giver, reader, owners)
    given = np.square(giver / scales[:, None]).sum(1)
    read = np.bincount(owners, np.square(reader * scales[owners]).sum(0))
    assert np.allclose(given[:2], read[:2], rtol=0.01)
    assert np.isfinite(balance(0 * giver, 0 * reader, owners)).all()


def rounded(weight: Float32, squares: Float64) -> Float32:
    return dequantize(fit(weight, QuantSpec(3, 32)))


def test_scales_undo_what_stands_in_the_way() -> None:
    """Columns whose inputs are large come back to where rounding does least harm."""
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((64, 64)).astype(np.float32)
    factors = np.ones(64, np.float32)
    factors[[5, 40]] = 25
    moments = np.diag(np.square(factors)).astype(np.float64)
    scales = choose_scales([weight / factors], moments, [rounded])
    plain = rounded(weight / factors, moments) - weight / factors
    scaled = rounded(weight / factors * scales.astype(np.float32), moments) / scales
    scaled -= weight / factors
    errors = [np.einsum("rc,cd,rd->", e, moments, e) for e in (scaled, plain)]
    assert errors[0] < 0.6 * errors[1]
    assert np.isclose(np.log(scales).mean(), 0)


@pytest.mark.parametrize("moments", [np.eye(64), np.zeros((64, 64))])
def test_scales_that_gain_nothing_are_one(moments: Float64) -> None:
    weight = np.random.default_rng(1).standard_normal((64, 64)).astype(np.float32)
    assert (choose_scales([weight], moments, [rounded]) == 1).all()


def test_dead_columns_get_finite_scales() -> None:
    weight = np.random.default_rng(1).standard_normal((8, 64)).astype(np.float32)
    weight[:, 3] = 0
    weight[:, 9] *= 1e4
    moments = np.diag(np.arange(64.0))
    scales = choose_scales([weight, 0 * weight], moments, [rounded, rounded])
    assert np.isfinite(scales).all() and (scales > 0).all()


# --- the model stays what it is ---


def test_rotation_changes_no_logits(source: Path, tmp_path: Path) -> None:
    target = convert(prepare(source, Request(rotate=True), "source"), tmp_path / "rotated")
    expected = our_logits(source)
    assert off(our_logits(target), expected) < 1e-5
    assert off(their_logits(target), expected) < 1e-4
    found, before = tensors(target), tensors(source)
    output = "model.layers.0.self_attn.o_proj.weight"
    assert not np.allclose(np.array(found[output]), np.array(before[output]), atol=0.01)
    is_tied = "lm_head.weight" not in found
    embedding = "model.embed_tokens.weight"
    assert mx.array_equal(found[embedding], before[embedding]) == is_tied
    norms = [name for name in found if name.endswith("layernorm.weight")]
    assert all(bool((found[name] == 1).all()) != is_tied for name in norms)
    assert not verify(target).errors


def test_smoothing_changes_no_logits(source: Path, tmp_path: Path) -> None:
    """Alone and after a rotation, with scales as they are chosen for a model with outliers."""
    config = json.loads((source / "config.json").read_text())
    folder = write_checkpoint(tmp_path / "outliers", config, with_outliers(config))
    expected = our_logits(folder)
    with Reader(folder) as reader:
        original = open_weights(folder, reader)
        paths = [matrix.path for matrix in layout.matrices(original.config)]
        rounding = dict.fromkeys(paths, rounded)
        for name, weights in (("scaled", original), ("both", Rotated(original))):
            scales = smoothing_scales(weights, rounding, IDS)
            if name == "scaled":
                assert len(scales) == 3 * config["num_hidden_layers"]
            copy = write_weights(tmp_path / name, config, Scaled(weights, scales))
            assert off(our_logits(copy), expected) < 1e-5
            assert off(their_logits(copy), expected) < 1e-4


def test_values_are_shared_by_the_heads_of_a_group(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", config_4x())
    with Reader(folder) as reader:
        weights = open_weights(folder, reader)
        scales = np.random.default_rng(0).uniform(0.1, 10, 32).astype(np.float32)
        scaled = Scaled(weights, {f"{layout.layer(1)}.{VALUES}": scales})
        copy = write_weights(tmp_path / "copy", config_4x(), scaled)
        owners = value_owners(weights.config)
    assert off(our_logits(copy), our_logits(folder)) < 1e-5
    assert owners.tolist() == [*range(16), *range(16), *range(16, 32), *range(16, 32)]


# --- conversions ---


@pytest.mark.parametrize(
    ("name", "method"),
    [
        pytest.param("untied", "gptq", marks=pytest.mark.nightly),
        ("tied", "rtn"),
        pytest.param("untied", "rtn", marks=pytest.mark.nightly),
        pytest.param("untied", "search", marks=pytest.mark.nightly),
        pytest.param("tied", "search", marks=pytest.mark.nightly),
        pytest.param("tied", "gptq", marks=pytest.mark.nightly),
    ],
)
def test_every_method(
    name: str, method: str, request: pytest.FixtureRequest, texts: Path, tmp_path: Path
) -> None:
    """What is written is close to the model that it was, and mlx-lm runs it."""
    source = request.getfixturevalue(name)
    asked = Request(QuantSpec(8, 32), method=method, smooth=True, rotate=True)  # type: ignore[arg-type]
    target = tmp_path / "out"
    convert(prepare(source, asked, "source", calibration_texts=[texts], target=target), target)
    expected = our_logits(source)
    assert off(our_logits(target), expected) < 0.1
    assert off(their_logits(target), our_logits(target)) < 1e-4
    assert not verify(target).errors
    manifest = json.loads((target / MANIFEST).read_text())
    stream = name == "untied"
    assert manifest["transforms"] == {
        "rotate": {"seed": 0, "residual_stream": stream, "values": True}, "smooth": True,
    }  # fmt: skip
    assert manifest["calibration"]["text"] == "en.txt"
    assert manifest["quality"]["overall"]["kl_mean"] < 0.01
    assert "| Change of basis | rotated, smoothed |" in (target / "README.md").read_text()
    assert any("attention's values" in note for note in manifest["notes"]) != stream
    assert not list(target.glob(".*"))


@pytest.mark.parametrize(
    "method", ["rtn", *(pytest.param(m, marks=pytest.mark.nightly) for m in ("search", "gptq"))]
)
def test_smoothing_saves_a_model_with_outliers(method: str, texts: Path, tmp_path: Path) -> None:
    config = config_4x(torch_dtype="bfloat16")
    source = write_checkpoint(tmp_path / "m", config, with_outliers(config), dtype=mx.bfloat16)
    expected = our_logits(source)
    errors = []
    for smooth in (False, True):
        asked = Request(QuantSpec(3, 32), method=method, smooth=smooth)  # type: ignore[arg-type]
        target = tmp_path / f"out{smooth}"
        convert(prepare(source, asked, "source", calibration_texts=[texts], target=target), target)
        errors.append(np.square(our_logits(target) - expected).mean())
    # GPTQ makes up for much of it by itself.
    assert errors[1] < (1 if method == "gptq" else 0.8) * errors[0]


@pytest.mark.nightly
def test_an_interrupted_run_goes_on(
    untied: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Request(QuantSpec(3, 32), smooth=True, rotate=True)
    torn = tmp_path / "torn"
    job = prepare(untied, asked, "source", calibration_texts=[texts], target=torn)
    whole = convert(job, tmp_path / "whole")

    def interrupt(done: int) -> None:
        if done > job.plan.source_bytes // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(job, torn, progress=interrupt)
    for change in ({"smooth": True}, {"rotate": True}):
        asked = Request(QuantSpec(3, 32), **change)
        with pytest.raises(UsageError, match="other options"):
            convert(
                prepare(
                    untied, asked, "source", calibration_texts=[texts], target=torn, resume=True
                ),
                torn, resume=True,
            )  # fmt: skip
    monkeypatch.setattr("apertus_mlx.convert.calibration.calibrated.smoothing_scales", None)
    resumed = convert(job, torn, resume=True)
    files = [folder / "model.safetensors" for folder in (resumed, whole)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_plain_weights_lose_only_their_rounding(untied: Path, tmp_path: Path) -> None:
    job = prepare(untied, Request(rotate=True), "source")
    target = convert(job, tmp_path / "out")
    assert tensors(target)["lm_head.weight"].dtype == mx.bfloat16
    assert 0 < off(our_logits(target), our_logits(untied)) < 0.02
    assert any("F32 rounded to BF16" in note for note in job.plan.notes)


def test_quantized_weights_can_be_dequantized_and_rotated(untied: Path, tmp_path: Path) -> None:
    codes = convert(prepare(untied, Request(QuantSpec(4, 32)), "source"), tmp_path / "codes")
    asked = Request(dequantize=True, rotate=True, dtype="F32")
    target = convert(prepare(codes, asked, "codes"), tmp_path / "out")
    assert off(our_logits(target), our_logits(codes)) < 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--smooth"], "--smooth: .*--bits"),
        (["--rotate"], "--rotate: .*keeps its codes"),
        (["--rotate", "--bits", "4", "--requantize", "--group-size", "32"], "keeps its codes"),
        (["--rotate", "--bits", "3"], "already quantized"),
        (["--rotate", "--dequantize", "--allow-nonfinite"], "rotation has no place"),
    ],
)
def test_codes_that_are_kept_cannot_change_basis(
    untied: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    codes = convert(prepare(untied, Request(QuantSpec(4, 32)), "source"), tmp_path / "codes")
    with pytest.raises(ApertusError, match=message):
        app(["convert", str(codes), str(tmp_path / "out"), *options], standalone_mode=False)
    assert not (tmp_path / "out").exists()


def test_weights_on_a_grid_cannot_change_basis(untied: Path, tmp_path: Path) -> None:
    """Plain weights that 4 bits hold exactly would lose that."""
    weights = tensors(untied)
    for name, weight in weights.items():
        if weight.ndim == 2:
            codes = mx.quantize(weight, group_size=32, bits=4)
            weights[name] = mx.dequantize(*codes, group_size=32, bits=4)
    plain = write_checkpoint(tmp_path / "plain", config_4x(), weights, dtype=mx.bfloat16)
    with pytest.raises(UsageError, match="lies on a grid"):
        prepare(plain, Request(QuantSpec(4, 32), rotate=True), "plain")
    prepare(plain, Request(QuantSpec(3, 32), rotate=True), "plain")


def test_plan_says_what_changes(tied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["convert", str(tied), "--bits", "4", "--smooth", "--rotate", "--plan"]
    app(command, standalone_mode=False)
    assert "change basis, quantize" in capsys.readouterr().out
    app([*command, "--json"], standalone_mode=False)
    plan = json.loads(capsys.readouterr().out)
    assert plan["transforms"]["rotate"]["residual_stream"] is False
    changed = {module["module"] for module in plan["modules"] if module["changes_basis"]}
    assert "model.layers.1.self_attn.o_proj" in changed
    assert "model.layers.1.attention_layernorm.weight" in changed
    assert not {"model.embed_tokens", "model.layers.0.mlp.down_proj", "model.norm.weight"} & changed
