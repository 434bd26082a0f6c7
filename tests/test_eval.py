"""The receipt: metrics against their definitions, and the command on tiny models."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from apertus_mlx.cli.app import app
from apertus_mlx.errors import UsageError
from apertus_mlx.load import load_model
from convert.calibration_text import read_texts
from convert.receipt import measure
from quant.metrics import compare, join, summarise
from tests.builders import config_4x, write_checkpoint


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
    assert found.kl_confident == pytest.approx(divergence[p.max(-1) >= 0.9].mean())
    assert found.top1_agreement == pytest.approx((p.argmax(-1) == q.argmax(-1)).mean())
    assert found.perplexity == pytest.approx(np.exp(losses[1]))
    assert found.perplexity_difference == pytest.approx(np.exp(losses[1]) - np.exp(losses[0]))


def test_nothing_confident_and_nothing_following() -> None:
    flat = np.zeros((3, 8), np.float32)
    found = summarise(compare(flat, flat, np.full(3, -1)))
    assert (found.kl_mean, found.top1_agreement) == (0, 1)
    assert found.kl_confident is found.perplexity is found.perplexity_difference is None
    with pytest.raises(ValueError, match="no tokens"):
        summarise(compare(flat[:0], flat[:0], np.zeros(0, np.int64)))


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "reference", config_4x(), dtype=mx.bfloat16)


def quantized(reference: Path, bits: int) -> Path:
    target = reference.with_name(f"model-{bits}")
    options = ["--bits", str(bits), "--group-size", "32"]
    app(["convert", str(reference), str(target), *options], standalone_mode=False)
    return target


def test_receipt_of_a_quantized_model(reference: Path, tmp_path: Path) -> None:
    """Beside MLX's own quantized layers, in float32."""
    texts = tmp_path / "de.txt"
    texts.write_text("Ein kurzer Satz, und noch einer.")
    model = quantized(reference, 3)
    receipt = measure(model, reference, read_texts([texts]))
    ids = mx.array([[1, *_bytes(texts.read_text())]])
    expected, found = (
        nn.log_softmax(load_model(folder, "float32")(ids)[0], axis=-1)
        for folder in (reference, model)
    )
    divergence = np.array((mx.exp(expected) * (expected - found)).sum(-1))
    assert receipt.overall.tokens == ids.size
    assert receipt.overall.kl_mean == pytest.approx(divergence.mean(), rel=1e-3)
    assert receipt.overall.kl_p90 == pytest.approx(np.quantile(divergence, 0.9), rel=1e-3)
    assert 0 < receipt.overall_floor.kl_mean < 0.1 * receipt.overall.kl_mean
    assert receipt.languages.keys() == {"de"}


def _bytes(text: str) -> list[int]:
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = sorted(ByteLevel.alphabet())
    pretokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    return [74 + alphabet.index(c) for c in pretokenizer.pre_tokenize_str(text)[0][0]]


def test_a_model_equals_itself_and_bits_order(reference: Path) -> None:
    texts = read_texts()
    same = measure(reference, reference, texts, 40).overall
    assert (same.kl_mean, same.top1_agreement, same.perplexity_difference) == (0, 1, 0)
    losses = [measure(quantized(reference, b), reference, texts, 40).overall for b in (2, 4, 8)]
    divergences = [damage.kl_mean for damage in losses]
    assert divergences == sorted(divergences, reverse=True)


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
    assert [line.split()[0] for line in lines if line] == ["text", "fr", "all"]
