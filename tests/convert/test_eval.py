"""The evaluation: metrics against their definitions, and the command on tiny models."""

from __future__ import annotations

import json
import re
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from apertus_mlx.backend.mlx import load_model
from apertus_mlx.cli.app import app
from apertus_mlx.convert.evaluation import evaluate, layerwise
from apertus_mlx.convert.evaluation.evaluate import measure, measure_all
from apertus_mlx.convert.evaluation.texts import read_texts
from apertus_mlx.errors import ApertusError, UsageError
from apertus_mlx.quant.metrics import compare, join, summarise
from tests.builders import config_4x, write_checkpoint
from tests.daily import every
from tests.hub_server import point_client_at, serving


def test_metrics_are_their_definitions() -> None:
    rng = np.random.default_rng(0)
    logits = [rng.standard_normal((50, 30)).astype(np.float32) * 4 for _ in range(2)]
    following = rng.integers(0, 30, 50)
    following[::10] = -1
    p, q = (np.exp(x.astype(np.float64)) for x in logits)
    p, q = (x / x.sum(-1, keepdims=True) for x in (p, q))
    divergence = (p * np.log(p / q)).sum(-1)
    known = following >= 0
    losses = [-np.log(x[known, following[known]]).mean() for x in (p, q)]
    parts = [slice(0, 20), slice(20, 50)]
    found = summarise(
        join([compare(logits[0][part], logits[1][part], following[part]) for part in parts])
    )
    assert found.tokens == 50
    assert found.kl_mean == pytest.approx(divergence.mean())
    assert found.kl_median == pytest.approx(np.median(divergence))
    assert found.kl_p90 == pytest.approx(np.quantile(divergence, 0.9))
    assert found.kl_margin == pytest.approx(1.96 * divergence.std(ddof=1) / np.sqrt(50))
    assert found.kl_confident == pytest.approx(divergence[p.max(-1) >= 0.9].mean())
    assert found.top1_agreement == pytest.approx((p.argmax(-1) == q.argmax(-1)).mean())
    assert found.acceptance == pytest.approx(np.minimum(p, q).sum(-1).mean())
    assert found.perplexity == pytest.approx(np.exp(losses[1]))
    assert found.perplexity_difference == pytest.approx(np.exp(losses[1]) - np.exp(losses[0]))


def test_nothing_confident_and_nothing_following() -> None:
    flat = np.zeros((3, 8), np.float32)
    found = summarise(compare(flat, flat, np.full(3, -1)))
    assert (found.kl_mean, found.top1_agreement) == (0, 1)
    assert found.kl_confident is found.perplexity is found.perplexity_difference is None
    with pytest.raises(ValueError, match="no tokens"):
        summarise(compare(flat[:0], flat[:0], np.zeros(0, np.int64)))


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "reference"
    return write_checkpoint(folder, config_4x(), dtype=mx.bfloat16)


def quantized(reference: Path, bits: int) -> Path:
    """Made once, beside the reference; nobody changes it."""
    target = reference.with_name(f"model-{bits}")
    if target.exists():
        return target
    options = ["--bits", str(bits), "--group-size", "32"]
    app(["convert", str(reference), str(target), *options], standalone_mode=False)
    return target


def test_evaluation_of_a_quantized_model(reference: Path, tmp_path: Path) -> None:
    """Beside MLX's own quantized layers, in float32."""
    texts = tmp_path / "de.txt"
    texts.write_text("Ein kurzer Satz, und noch einer.")
    model = quantized(reference, 3)
    evaluation = measure(model, reference, read_texts([texts]))
    ids = mx.array([[1, *_bytes(texts.read_text())]])
    expected, found = (
        nn.log_softmax(load_model(folder, "float32")(ids)[0], axis=-1)
        for folder in (reference, model)
    )
    divergence = np.array((mx.exp(expected) * (expected - found)).sum(-1))
    assert evaluation.overall.tokens == ids.size
    assert evaluation.overall.kl_mean == pytest.approx(divergence.mean(), rel=1e-3)
    assert evaluation.overall.kl_p90 == pytest.approx(np.quantile(divergence, 0.9), rel=1e-3)
    assert 0 < evaluation.overall_floor.kl_mean < 0.1 * evaluation.overall.kl_mean
    assert evaluation.languages.keys() == {"de"}


def _bytes(text: str) -> list[int]:
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = sorted(ByteLevel.alphabet())
    pretokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    return [74 + alphabet.index(c) for c in pretokenizer.pre_tokenize_str(text)[0][0]]


def test_a_model_equals_itself_and_bits_order(reference: Path) -> None:
    texts = read_texts()
    models = [reference, *(quantized(reference, bits) for bits in (2, 4, 8))]
    same, *losses = (found.overall for found in measure_all(models, reference, texts, 40))
    assert (same.kl_mean, same.top1_agreement, same.perplexity_difference) == (0, 1, 0)
    divergences = [divergence.kl_mean for divergence in losses]
    assert divergences == sorted(divergences, reverse=True)


def test_several_models_are_measured_as_if_alone(
    reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the reference goes through its layers no more often than for one: twice with its floor.

    No more than one layer is held at a time.
    """
    texts = read_texts()
    models = [quantized(reference, bits) for bits in (2, 4)]
    alone = [measure(model, reference, texts, 40) for model in models]
    runs: list[Path] = []
    held = most = 0

    class Counted(layerwise.Layer):
        def __init__(self, weights: layerwise.SourceWeights, *others: Any) -> None:
            nonlocal held, most
            super().__init__(weights, *others)
            if others[0] == 0:
                runs.append(Path(weights.source.name))
            held, most = held + 1, max(most, held + 1)

        def __del__(self) -> None:
            nonlocal held
            held -= 1

    monkeypatch.setattr(layerwise, "Layer", Counted)
    told: list[tuple[int, int]] = []
    together = measure_all(models, reference, texts, 40, lambda *done: told.append(done))
    assert together == alone
    assert runs == [reference, reference, *models]
    # The next one is built while the name still holds the one before.
    assert most <= 2
    # A comparison counts as two layers: the heads have 49,152 weights, a layer has 28,672.
    assert told == sorted(told)
    assert list(dict.fromkeys(told)) == [(n, 14) for n in range(1, 15)]


def test_progress_goes_on_while_logits_are_compared(
    reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is told after each block of them."""
    monkeypatch.setattr(layerwise, "BLOCK_LOGITS", 384 * 50)
    monkeypatch.setattr(layerwise, "BLOCK_TOKENS", 1)
    told: list[int | None] = []

    def watched(*arguments: Any) -> Any:
        told.append(None)
        return compare(*arguments)

    monkeypatch.setattr(evaluate, "compare", watched)
    measure(quantized(reference, 8), reference, read_texts(), 60, lambda done, _: told.append(done))
    assert told.count(None) > 4
    assert all(before is not None or after is not None for before, after in pairwise(told))
    known = [done for done in told if done is not None]
    # The comparison of the reference with itself begins at 4 of 10.
    assert known == sorted(known) and set(known) == set(range(1, 11))
    assert known.count(5) > 1


def test_bytes_are_those_of_the_tensors(reference: Path) -> None:
    model = quantized(reference, 4)
    found = measure(model, reference, read_texts(), 40).weight_bytes
    arrays = mx.load(str(model / "model.safetensors"))
    assert isinstance(arrays, dict)
    assert found == sum(array.nbytes for array in arrays.values())


def test_other_tokenizers_are_refused(reference: Path, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other", config_4x(vocab_size=400))
    with pytest.raises(UsageError, match="tokenizer"):
        measure(other, reference, read_texts(), 40)


def test_command(reference: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model = quantized(reference, 4)
    text = tmp_path / "fr.txt"
    text.write_text("Bonjour le monde.")
    capsys.readouterr()
    command = ["eval", str(model), "--reference", str(reference), "--text", str(text)]
    app([*command, "--json"], standalone_mode=False)
    report = json.loads(capsys.readouterr().out)
    assert report["languages"].keys() == {"fr"}
    assert report["overall"]["kl_mean"] > report["noise_floor"]["kl_mean"] > 0
    app(command, standalone_mode=False)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["text", "fr", "all"]


@pytest.fixture
def french(tmp_path: Path) -> Path:
    path = tmp_path / "fr.txt"
    path.write_text("Bonjour le monde.")
    return path


def test_command_with_several_models(
    reference: Path, french: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = [str(quantized(reference, bits)) for bits in (3, 8)]
    options = ["--reference", str(reference), "--text", str(french)]
    capsys.readouterr()
    app(["eval", *models, *options, "--json"], standalone_mode=False)
    report = json.loads(capsys.readouterr().out)
    assert list(report["models"]) == ["model-3", "model-8"]
    app(["eval", models[0], *options, "--json"], standalone_mode=False)
    assert json.loads(capsys.readouterr().out) == report["models"]["model-3"]
    app(["eval", *models, *options], standalone_mode=False)
    header, *rows = (line.split() for line in capsys.readouterr().out.splitlines())
    assert header[:3] == ["model", "size", "text"]
    # The size has its unit as a word of its own.
    assert [(row[0], row[3]) for row in rows] == [
        (model, text) for model in ("model-3", "model-8") for text in ("fr", "all")
    ]


@pytest.mark.parametrize("names", every(2, [["m", "n"], ["m"]]))
def test_plot(reference: Path, french: Path, tmp_path: Path, names: list[str]) -> None:
    """One point for each model at its size and divergence, and the noise floor."""
    pytest.importorskip("matplotlib")
    made = [quantized(reference, 3), reference]
    models = [
        str(shutil.copytree(path, tmp_path / name)) for path, name in zip(made, names, strict=False)
    ]
    origin = tmp_path / "n" if len(names) > 1 else reference
    drawn = tmp_path / "kl.svg"
    command = ["eval", *models, "--reference", str(origin), "--text", str(french)]
    app([*command, "--plot", str(drawn)], standalone_mode=False)
    labels = re.findall(r"<!-- (.*?) -->", drawn.read_text())
    assert {*names, "noise floor", "weights, MB"} <= set(labels)
    assert "mean KL divergence, nats" in labels
    with pytest.raises(UsageError, match="expected a name ending"):
        app([*command, "--plot", str(tmp_path / "kl.txt")], standalone_mode=False)


def test_one_label_for_each_model(
    reference: Path, french: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    twins = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        twins.append(str(shutil.copytree(quantized(reference, 8), tmp_path / folder / "model")))
    options = ["--reference", str(reference), "--text", str(french)]
    capsys.readouterr()
    app(["eval", *twins, *options, "--json"], standalone_mode=False)
    assert list(json.loads(capsys.readouterr().out)["models"]) == twins
    with pytest.raises(UsageError, match="given twice"):
        app(["eval", twins[0], twins[0], *options], standalone_mode=False)


def test_a_mistake_shows_before_anything_is_measured(
    reference: Path, french: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = quantized(reference, 8)
    other = write_checkpoint(tmp_path / "other", config_4x(vocab_size=400))
    monkeypatch.setattr(evaluate, "hidden_states", None)
    options = ["--reference", str(reference), "--text", str(french)]
    for bad in (other, tmp_path / "nowhere"):
        with pytest.raises(ApertusError):
            app(["eval", str(good), str(bad), *options], standalone_mode=False)


def test_revisions_of_models_and_reference(
    reference: Path, french: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """A branch of the model, another of the reference; folders beside them are not asked."""
    folders = {bits: quantized(reference, bits) for bits in (2, 8)}
    capsys.readouterr()

    def measured(*arguments: str) -> dict[str, Any]:
        app(["eval", *arguments, "--text", str(french), "--json"], standalone_mode=False)
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    with serving() as server:
        point_client_at(server.endpoint, tmp_path / "home", monkeypatch)
        small, plain = (server.repository(f"swiss-ai/{name}") for name in ("Small", "Plain"))
        small.commit_folder(folders[8])
        small.commit_folder(folders[2], "coarse")
        plain.commit_folder(folders[2])
        plain.commit_folder(reference, "original")
        local = measured(str(folders[2]), "--reference", str(reference))
        remote = ("--reference", "swiss-ai/Plain", "--reference-revision", "original")
        assert measured("swiss-ai/Small", "--revision", "coarse", *remote) == local
        both = measured("swiss-ai/Small", str(folders[8]), "--revision", "coarse", *remote)
        assert both["models"]["swiss-ai/Small"] == local
        assert both["models"]["model-8"]["overall"] != local["overall"]
    options = ["--reference", str(reference), "--text", str(french)]
    for mistake in (["--revision", "main"], ["--reference-revision", "main"]):
        with pytest.raises(UsageError, match="local folder"):
            app(["eval", str(folders[8]), *options, *mistake], standalone_mode=False)
