"""A cut model learns from the whole one, whose answers count on the kept tokens alone."""

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
from apertus_mlx.convert.distill.teacher_cache import TeacherCache
from apertus_mlx.convert.distill.training import Options, best
from apertus_mlx.convert.evaluation.layerwise import open_weights
from apertus_mlx.convert.evaluation.texts import DEFAULT_DIRECTORY, open_text
from apertus_mlx.convert.sources.reading import Reader
from apertus_mlx.convert.vocabulary.matching import on_part
from apertus_mlx.convert.write.manifest import MANIFEST
from apertus_mlx.errors import UsageError
from apertus_mlx.hub.demo import model_dir
from tests.builders import config_4x, write_checkpoint
from tests.convert.test_vocabulary import library

TEXT = DEFAULT_DIRECTORY / "de.txt"


def kept_shares(teacher: Path, folder: Path, window: np.ndarray) -> np.ndarray:
    """What the whole model says of the tokens of `folder`, by the softmax in float64."""
    whole, part = library(teacher), library(folder)
    kept = np.array([whole.token_to_id(part.id_to_token(i)) for i in range(part.get_vocab_size())])
    logits = load_model(teacher, "float32")(mx.array(kept[window])[None])[0]
    powers = np.exp(np.array(logits, np.float64)[:, kept])
    return np.asarray(powers / powers.sum(-1, keepdims=True))


def divergence(whole: Path, folder: Path, window: np.ndarray) -> float:
    """KL divergence from the whole model on the kept tokens, in nats."""
    teacher = kept_shares(whole, folder, window)
    logits = np.array(load_model(folder, "float32")(mx.array(window)[None])[0], np.float64)
    student = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    return float((teacher * np.log(teacher / student)).sum(-1).mean())


@pytest.mark.parametrize("remapped", [False, True])
def test_a_teacher_spreads_what_it_gives_to_cut_tokens(tmp_path: Path, remapped: bool) -> None:
    how = {"vocab_for": TEXT} if remapped else {"vocab": 1024}
    student = convert_model(None, tmp_path / "student", **how).output
    (whole, _), (part, _) = open_text(model_dir()), open_text(student)
    window = np.array(part.encode("Die Hauptstadt der Schweiz ist Bern."), np.int64)
    answers = TeacherCache(tmp_path / "answers", [window[None]])
    with Reader(model_dir()) as reader:
        answers.fill(on_part(open_weights(model_dir(), reader), whole, part), 32, lambda _: None)
    found = answers.batch(0)
    expected = kept_shares(model_dir(), student, window)
    named = np.array(found.likeliest)[0].astype(int)
    shares = np.array(found.shares)[0]
    np.testing.assert_allclose(
        shares[:, :-1], np.take_along_axis(expected, named, axis=-1), rtol=2e-3, atol=1e-6
    )
    np.testing.assert_allclose(shares.sum(-1), 1, rtol=1e-5)
    assert [set(row) for row in named] == [set(row) for row in expected.argsort(-1)[:, -32:]]


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
@pytest.mark.parametrize("how", [{"vocab": 1024}, {"vocab_for": TEXT}])
def test_the_embedded_model_heals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: dict[str, Any]
) -> None:
    monkeypatch.setattr("apertus_mlx.convert.distill.resources.BATCH_TOKENS", 1024)
    options = Options(text_share=0.0, epochs=3, top_k=256)
    require_healed(model_dir(), tmp_path, options, [], (8192, 64), 0.7, **how)


def require_healed(
    whole: Path, folder: Path, options: Options, texts: list[Path], sizes: tuple[int, int],
    least: float, **how: Any,
) -> None:  # fmt: skip
    """Cut in 2 bits and trained on so many tokens in such windows, it is closer to `whole`."""
    student = convert_model(whole, folder / "student", bits=2, group_size=32, **how).output
    job = prepare(whole, student, "whole", options, texts, *sizes)
    out = folder / "out"
    history = distill(job, out).history
    before, after = (
        np.mean([divergence(whole, model, window) for window in job.held_out])
        for model in (student, out)
    )
    # In parts of the likeliest tokens and the rest it never exceeds the divergence itself.
    assert 0.5 * before < history[0].held_out_divergence <= 1.02 * before
    assert best(history).held_out_divergence <= 1.02 * after
    print(f"{before:.4f} -> {after:.4f} nats")
    assert after < least * before
    manifest = json.loads((out / MANIFEST).read_bytes())
    assert manifest["vocabulary"] == json.loads((student / MANIFEST).read_bytes())["vocabulary"]


def test_a_teacher_with_fewer_tokens_is_refused(tmp_path: Path) -> None:
    teacher = convert_model(None, tmp_path / "teacher", vocab=1024).output
    student = convert_model(None, tmp_path / "student", bits=4).output
    with pytest.raises(UsageError, match="has other tokens than"):
        prepare(teacher, student, "cut", Options(), [TEXT], 640, 32)
