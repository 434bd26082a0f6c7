"""Calibration texts and the layer-by-layer run, beside the model's own forward pass."""

from __future__ import annotations

import json
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from apertus_mlx.backend.mlx import load_model
from apertus_mlx.checkpoint import layout
from apertus_mlx.convert.calibration import calibrate, fitting
from apertus_mlx.convert.calibration.fitting import Moments, Objective, fit
from apertus_mlx.convert.evaluation.layerwise import head_path, hidden_states, open_weights
from apertus_mlx.convert.evaluation.texts import (
    Document,
    TextSet,
    hold_out,
    language_windows,
    read_texts,
    sample_windows,
)
from apertus_mlx.convert.sources.reading import Reader
from apertus_mlx.errors import ApertusError, NotFoundError, RejectedError, UsageError
from apertus_mlx.quant import descent, search
from apertus_mlx.quant.affine import dequantize, round_scales
from apertus_mlx.quant.curvature import damped
from apertus_mlx.quant.spec import QuantSpec
from apertus_mlx.text.template import ChatTemplate
from apertus_mlx.text.tokenizer import Tokenizer
from tests.builders import config_4x, write_checkpoint
from tests.simulated_gpu import simulated_mac


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    folder = write_checkpoint(tmp_path / "tokenizer", config_4x())
    return Tokenizer.load(folder, vocab_size=384, bos_token_id=1)


def test_own_texts_are_many_languages(tokenizer: Tokenizer) -> None:
    texts = read_texts()
    languages = {document.language for document in texts.documents}
    assert {"en", "de", "fr", "it", "rm", "ar", "zh", "hi", "sw"} <= languages
    assert len(languages) >= 12
    found = language_windows(texts, tokenizer, None, 64, 100)
    assert found.keys() == languages
    for groups in found.values():
        assert sum(group.size for group in groups) <= 100


def test_a_token_that_is_left_over_is_a_window(tokenizer: Tokenizer) -> None:
    """Of texts of 9 and 12 tokens; one that is empty has none but the first."""
    documents = tuple(Document("la", text) for text in ("a" * 8, "b" * 11, ""))
    found = language_windows(TextSet("", "", documents), tokenizer, None, 4, 100)["la"]
    assert [group.shape for group in found] == [(5, 4), (1, 1)]
    assert found[1].tolist() == [tokenizer.encode("a")]
    assert not language_windows(TextSet("", "", documents[2:]), tokenizer, None, 4, 100)


def test_sampling_is_seeded_and_recorded(tokenizer: Tokenizer) -> None:
    texts = read_texts()
    first, again, other = (
        sample_windows(texts, tokenizer, None, 128, 5, seed) for seed in (1, 1, 2)
    )
    assert np.array_equal(first.windows, again.windows)
    assert not np.array_equal(first.windows, other.windows)
    assert first.record() == {
        "text": "default", "sha256": texts.sha256, "seed": 1, "windows": 5, "window_tokens": 128,
    }  # fmt: skip


def test_a_part_of_every_language_is_held_out() -> None:
    texts = read_texts()
    seen, judged = hold_out(texts)
    languages = [{document.language for document in part.documents} for part in (seen, judged)]
    assert languages[0] == languages[1] == {document.language for document in texts.documents}
    calibrated = "".join(str(document.content) for document in seen.documents)
    assert not [d for d in judged.documents if str(d.content) in calibrated]


def test_files_of_every_kind(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", config_4x())
    tokenizer = Tokenizer.load(model, vocab_size=384, bos_token_id=1)
    template = ChatTemplate.load(model, tokenizer)
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "pt-BR.txt").write_text("Bom dia.")
    (folder / "my notes.md").write_text("Notes.")
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    lines = [{"text": "Salve", "language": "la"}, {"messages": messages, "language": "en"}]
    (folder / "more.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hi"}], "name": "Ann"}]
    chat = {"messages": [*parts, messages[1]], "language": "en"}
    (folder / "chat.json").write_text(json.dumps(chat))
    texts = read_texts([folder])
    assert sorted(d.language for d in texts.documents) == ["en", "en", "la", "pt-BR", "und"]
    windows = language_windows(texts, tokenizer, template, 64, 1000)
    text = tokenizer.decode(windows["en"][0][0].tolist(), skip_special=False)
    assert text.endswith("<|assistant_start|>Hello<|assistant_end|>")


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("missing.txt", None, NotFoundError),
        ("table.csv", b"a,b", UsageError),
        ("empty.txt", b" \n", UsageError),
        ("latin.txt", b"caf\xe9", RejectedError),
        ("broken.jsonl", b'{"text": "a"}\n{"text": ', RejectedError),
        ("array.jsonl", b"[1]", RejectedError),
        ("both.json", b'{"text": "a", "messages": []}', RejectedError),
        ("label.json", b'{"text": "a", "language": "no such/label"}', RejectedError),
        ("number.json", b'{"text": "a", "language": 7}', RejectedError),
        ("roles.json", b'{"messages": [{"role": "user"}]}', RejectedError),
        ("first.json", b'{"messages": [{"role": "tool", "content": "7"}]}', RejectedError),
    ],
)
def test_bad_texts_are_refused_in_one_line(
    tmp_path: Path, name: str, content: bytes | None, error: type[ApertusError]
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(error) as caught:
        read_texts([path])
    assert "\n" not in str(caught.value) and name in str(caught.value)


def test_text_shorter_than_a_window(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "en.txt"
    path.write_text("Hello")
    assert sample_windows(read_texts([path]), tokenizer, None, 512, 8, 0).windows.shape == (1, 6)


def test_conversations_need_a_template(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "en.json"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "Hi"}]}))
    with pytest.raises(RejectedError, match="template"):
        sample_windows(read_texts([path]), tokenizer, None, 512, 8, 0)


@pytest.mark.parametrize("tied", [True, False])
def test_layer_by_layer_is_the_model(tmp_path: Path, tied: bool) -> None:
    folder = write_checkpoint(tmp_path / "model", config_4x(tie_word_embeddings=tied))
    windows = np.random.default_rng(0).integers(0, 384, (3, 20))
    expected = np.array(load_model(folder, "float32")(mx.array(windows)))
    with Reader(folder) as reader:
        weights = open_weights(folder, reader)
        hidden = hidden_states(weights, [windows[:1], windows[1:]])
        logits = np.concatenate(hidden) @ weights.matrix(head_path(weights.config)).T
    assert np.abs(logits - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize(("tied", "bits"), [(True, 2), (False, 3)])
def test_calibrated_codes_predict_better_than_searched(
    tmp_path: Path, tied: bool, bits: int
) -> None:
    """Beside search, on tokens that calibration has not seen."""
    folder = write_checkpoint(tmp_path / "model", config_4x(tie_word_embeddings=tied))
    rng = np.random.default_rng(1)
    windows, held_out = rng.integers(0, 384, (24, 64)), rng.integers(0, 384, (4, 64))
    spec = QuantSpec(bits, 32)
    with Reader(folder) as reader:
        weights = open_weights(folder, reader)
        paths = [matrix.path for matrix in layout.matrices(weights.config)]
        steps: list[int] = []
        codes = dict(
            calibrate.quantize_model(
                weights, dict.fromkeys(paths, spec), windows, progress=steps.append
            )
        )
        assert list(codes) == paths
        assert steps == sorted(steps) and steps[-1] == 2 * weights.config.num_hidden_layers
        originals = {path: weights.matrix(path) for path in paths}
    for found in codes.values():
        assert np.array_equal(round_scales(found.scales, "BF16"), found.scales)
        assert np.array_equal(round_scales(found.biases, "BF16"), found.biases)
    searched = {path: search.fit(weight, spec) for path, weight in originals.items()}
    model = load_model(folder, "float32")
    exact = np.array(model(mx.array(held_out)))
    errors = []
    for chosen in (codes, searched):
        for path, quantized in chosen.items():
            model.load_weights([(f"{path}.weight", mx.array(dequantize(quantized)))], strict=False)
        errors.append(np.square(np.array(model(mx.array(held_out))) - exact).mean())
    assert errors[0] < 0.9 * errors[1]


def test_modules_without_a_format_stay(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", config_4x())
    with Reader(folder) as reader:
        weights = open_weights(folder, reader)
        chosen = {"model.layers.1.mlp.up_proj": QuantSpec(4, 64)}
        codes = dict(calibrate.quantize_model(weights, chosen, np.full((1, 3), 5)))
    assert codes.keys() == chosen.keys()


def test_blocks_of_rows_lose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same error within a hair; near ties may fall otherwise."""
    rng = np.random.default_rng(4)
    weight = rng.standard_normal((300, 64)).astype(np.float32)
    inputs = rng.standard_normal((500, 64)) @ rng.standard_normal((64, 64))
    errors = []
    for rows in (2048, 50):
        monkeypatch.setattr(fitting, "BLOCK_ROWS", rows)
        moments = Moments(weight)
        moments.add(mx.array(inputs[None]), mx.array(inputs[None]))
        codes = fit(weight, QuantSpec(3, 32), Objective.of(moments, 0.5), "BF16")
        assert codes.codes.shape == weight.shape and len(codes.scales) == len(weight)
        difference = (dequantize(codes) - weight).astype(np.float64)
        errors.append(np.square(inputs @ difference.T).sum())
    assert errors[1] == pytest.approx(errors[0], rel=2e-3)


@pytest.mark.parametrize("rows", [20, 100])
def test_codes_match_outputs_of_the_original_on_other_inputs(rows: int) -> None:
    """Whether what is missing is kept for each column or for each row of the one weight.

    Beside weights that least squares in float64 finds for the inputs of the quantized model.
    """
    rng = np.random.default_rng(5)
    weight = rng.standard_normal((rows, 64)).astype(np.float32)
    quantized = rng.standard_normal((400, 64)) @ (np.eye(64) + 0.2 * rng.standard_normal((64, 64)))
    original = quantized + 0.3 * rng.standard_normal((400, 64))
    moments = Moments(weight)
    for part in (slice(0, 150), slice(150, 400)):
        moments.add(mx.array(original[None, part]), mx.array(quantized[None, part]))
    codes = fit(weight, QuantSpec(8, 32), Objective.of(moments, 1.0), "F32")
    second = damped(quantized.T @ quantized)
    scale = np.square(quantized).sum(0).mean()
    expected = weight @ (second + (original - quantized).T @ quantized / scale)
    expected = np.linalg.solve(second, expected.T).T
    errors = [
        np.einsum("rc,cd,rd->", found - expected, second, found - expected)
        for found in (dequantize(codes), weight)
    ]
    assert errors[0] < 0.05 * errors[1]


@pytest.mark.without_gpu
def test_on_mlx_as_on_numpy() -> None:
    """The way of a GPU, computed on the CPU: the objective differs by at most 0.5 %."""
    rng = np.random.default_rng(6)
    weight = rng.standard_normal((24, 64)).astype(np.float32)
    inputs = (rng.standard_normal((400, 64)) @ rng.standard_normal((64, 64))).astype(np.float32)
    errors = []
    for on_gpu, place in ((False, nullcontext()), (True, simulated_mac())):
        with place:
            moments = Moments(weight)
            moments.add(mx.array(inputs[None] * 1.02), mx.array(inputs[None]))
            assert isinstance(moments.second, mx.array) is on_gpu
            codes = fit(weight, QuantSpec(4, 32), Objective.of(moments, 1.0), "BF16")
        difference = (dequantize(codes) - 1.02 * weight).astype(np.float64)
        errors.append(np.square(inputs @ difference.T).sum())
    assert errors[1] == pytest.approx(errors[0], rel=5e-3)
    assert errors[0] < 0.05 * np.square(inputs @ weight.T).sum()


@pytest.mark.parametrize("by_groups", [True, False])
def test_codes_of_two_bits_go_beyond_where_descent_rests(
    by_groups: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of three bits do not; the objective in float64, beside much more of the descent."""
    monkeypatch.setattr(fitting, "GROUPWISE_LEFT", np.inf if by_groups else 0.0)
    rng = np.random.default_rng(8)
    weight = rng.standard_normal((48, 128)).astype(np.float32)
    inputs = rng.standard_normal((1000, 128)) @ (
        np.eye(128) + 0.1 * rng.standard_normal((128, 128))
    )
    moments = damped(inputs.T @ inputs)

    def error(bits: int) -> float:
        found = Moments(weight)
        found.add(mx.array(inputs[None]), mx.array(inputs[None]))
        codes = fit(weight, QuantSpec(bits, 64), Objective.of(found, 0.0), "BF16")
        off = (dequantize(codes) - weight).astype(np.float64)
        return float(np.vdot(off @ moments, off))

    chosen = error(2), error(3)
    monkeypatch.setattr(fitting, "ANNEALED_BITS", 0)
    monkeypatch.setattr(fitting.descent, "improve", partial(descent.improve, visits=40))
    assert chosen[0] < 0.97 * error(2)
    assert chosen[1] > 0.97 * error(3)


@pytest.mark.parametrize(("tokens", "by_groups"), [(64, False), (4000, True)])
def test_groups_or_single_columns_whichever_leaves_less(
    tokens: int, by_groups: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few inputs say of single columns which matter; both ways beside each other, in float64."""
    rng = np.random.default_rng(7)
    weight = rng.standard_normal((48, 256)).astype(np.float32)
    inputs = rng.standard_normal((tokens, 256)) * np.exp(0.5 * rng.standard_normal(256))
    inputs[:, 1:] += 0.5 * inputs[:, :-1]
    moments = damped(inputs.T @ inputs)

    def error() -> float:
        found = Moments(weight)
        found.add(mx.array(inputs[None]), mx.array(inputs[None]))
        codes = fit(weight, QuantSpec(4, 64), Objective.of(found, 0.5), "BF16")
        off = (dequantize(codes) - weight).astype(np.float64)
        return float(np.vdot(off @ moments, off))

    chosen = error()
    ways = []
    for most in (0.0, np.inf):
        monkeypatch.setattr(fitting, "GROUPWISE_LEFT", most)
        ways.append(error())
    assert chosen == ways[by_groups] == min(ways)
