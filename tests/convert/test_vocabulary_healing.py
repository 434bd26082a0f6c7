"""A cut model learns from the whole one, which reads its own tokens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from apertus_mlx import convert_model
from apertus_mlx.backend.mlx import load_model
from apertus_mlx.convert.distill.run import distill, prepare
from apertus_mlx.convert.distill.training import Options, best
from apertus_mlx.convert.evaluation.texts import DEFAULT_DIRECTORY
from apertus_mlx.convert.vocabulary.matching import match
from apertus_mlx.convert.write.manifest import MANIFEST
from apertus_mlx.errors import UsageError
from apertus_mlx.hub.demo import model_dir
from benchmarks.vocabulary_healing import JUDGED_SEED, heal, recipe
from tests.builders import config_4x, write_checkpoint
from tests.convert.test_vocabulary_matching import said

TEXT = DEFAULT_DIRECTORY / "de.txt"


def divergence(whole: Path, folder: Path, windows: np.ndarray) -> float:
    """KL divergence from the whole model in nats, where both vocabularies have a border."""
    matching = match(whole, folder)
    assert matching is not None
    student, losses = load_model(folder, "float32"), []
    for window in windows:
        ids = matching.read(window[None]).whole[0].tolist()
        logits = np.array(student(mx.array(window)[None])[0], np.float64)
        shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        for own, (values, rest) in zip(shares, said(whole, folder, ids, list(window)), strict=True):
            if rest == 0 and values.any():
                losses.append((values * np.log(np.maximum(values, 1e-300) / own)).sum())
    return float(np.mean(losses))


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """Random weights with the embedded model's tokenizer."""
    config = config_4x(vocab_size=1792, tie_word_embeddings=True)
    folder = write_checkpoint(tmp_path / "tiny", config, dtype=mx.bfloat16, tokenizer=False)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(model_dir() / name, folder)
    return folder


def test_a_cut_model_heals(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = Options(text_share=0.0, learning_rate=5e-3, top_k=1000)
    monkeypatch.setattr("apertus_mlx.convert.distill.resources.BATCH_TOKENS", 128)
    require_healed(tiny, tmp_path, options, [TEXT], (512, 32), 0.9, vocab=1024)


@pytest.mark.nightly
@pytest.mark.timeout(900)
@pytest.mark.parametrize("how", [{"vocab": 1024}, {"vocab_for": TEXT}])
def test_the_embedded_model_heals(
    tmp_path: Path, how: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On documents of its own, since it knows nothing else."""
    monkeypatch.setattr("apertus_mlx.convert.distill.resources.BATCH_TOKENS", 512)
    cut = convert_model(None, tmp_path / "cut", bits=4, **how).output
    heal(cut, tmp_path / "healed", Options(learning_rate=3e-3), 8192)
    windows = recipe(cut, JUDGED_SEED, 2)
    before, after = (
        divergence(model_dir(), folder, windows) for folder in (cut, tmp_path / "healed")
    )
    print(f"{before:.4f} -> {after:.4f} nats")
    assert after < 0.95 * before


def require_healed(
    whole: Path, folder: Path, options: Options, texts: list[Path], sizes: tuple[int, int],
    least: float, **how: Any,
) -> None:  # fmt: skip
    """Cut in 2 bits and trained on so many tokens in such windows, it is closer to `whole`."""
    student = convert_model(whole, folder / "student", bits=2, group_size=32, **how).output
    job = prepare(whole, student, "whole", options, texts, *sizes)
    out = folder / "out"
    history = distill(job, out).history
    before, after = (divergence(whole, model, job.held_out) for model in (student, out))
    print(f"{before:.4f} -> {after:.4f} nats")
    assert after < least * before
    assert best(history, options).held_out_divergence < history[0].held_out_divergence
    manifest = json.loads((out / MANIFEST).read_bytes())
    assert manifest["vocabulary"] == json.loads((student / MANIFEST).read_bytes())["vocabulary"]


def test_a_teacher_with_fewer_tokens_is_refused(tmp_path: Path) -> None:
    teacher = convert_model(None, tmp_path / "teacher", vocab=1024).output
    student = convert_model(None, tmp_path / "student", bits=4).output
    with pytest.raises(UsageError, match="has other tokens than"):
        prepare(teacher, student, "cut", Options(), [TEXT], 640, 32)
