"""Golden answers of a converted folder: as mlx-lm computes them, and noticed where they differ."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from apertus_mlx.convert.check.verify import verify
from apertus_mlx.convert.job import convert, prepare
from apertus_mlx.convert.plan.policy import Request
from apertus_mlx.convert.write.golden_answers import GOLDEN_ANSWERS, TOKENS, differing_answers
from apertus_mlx.convert.write.manifest import MANIFEST, add_file
from apertus_mlx.errors import RejectedError
from apertus_mlx.hub.demo import model_dir
from apertus_mlx.quant.spec import QuantSpec
from tests.builders import config_4x, write_checkpoint
from tests.daily import every


def small_model(folder: Path) -> Path:
    """Random weights with the embedded model's tokens and templates."""
    config = config_4x(vocab_size=1792, tie_word_embeddings=True)
    write_checkpoint(folder, config, dtype=mx.bfloat16, tokenizer=False)
    for path in model_dir().iterdir():
        if path.suffix in (".json", ".jinja") and path.name != "config.json":
            shutil.copy(path, folder)
    return folder


@pytest.fixture(scope="module", params=every(2, ["small", "embedded"]))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("golden")
    source = model_dir() if request.param == "embedded" else small_model(place / "small")
    target = place / "out"
    convert(prepare(source, Request(QuantSpec(4, 64)), request.param), target)
    assert not verify(target, golden=True).findings
    return target


@pytest.fixture
def restored(folder: Path) -> Any:
    before = {name: (folder / name).read_bytes() for name in (GOLDEN_ANSWERS, MANIFEST)}
    yield folder
    for name, content in before.items():
        (folder / name).write_bytes(content)


def answers(folder: Path) -> list[dict[str, Any]]:
    values: dict[str, Any] = json.loads((folder / GOLDEN_ANSWERS).read_text(encoding="utf-8"))
    assert values["computed_in"] == "float32"
    found: list[dict[str, Any]] = values["answers"]
    return found


def test_answers_are_mlx_lms_in_float32(folder: Path) -> None:
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    model.set_dtype(mx.float32)
    assert len(answers(folder)) >= 6
    for answer in answers(folder):
        ids = [*answer["prompt_token_ids"], *answer["token_ids"]]
        logits = model(mx.array([ids]))[0, -TOKENS - 1 : -1].astype(mx.float32)
        first, second = mx.sort(mx.topk(logits, 2, axis=-1), axis=-1).T[::-1]
        assert mx.argmax(logits, axis=-1).tolist() == answer["token_ids"], answer["name"]
        assert (first - second).tolist() == pytest.approx(answer["margins"], abs=2e-3)


def test_the_manifest_knows_them_and_they_come_out_again(folder: Path) -> None:
    before = (folder / GOLDEN_ANSWERS).read_bytes(), (folder / MANIFEST).read_bytes()
    assert not verify(folder).findings
    assert not verify(folder, golden=True).findings
    assert ((folder / GOLDEN_ANSWERS).read_bytes(), (folder / MANIFEST).read_bytes()) == before


@pytest.mark.parametrize("clear", [True, False])
def test_another_answer_is_told_where_it_was_clear(restored: Path, clear: bool) -> None:
    values = json.loads((restored / GOLDEN_ANSWERS).read_text(encoding="utf-8"))
    entry = values["answers"][0]
    entry["token_ids"][0] += 1
    entry["margins"][0] = 5.0 if clear else 0.1
    (restored / GOLDEN_ANSWERS).write_text(json.dumps(values), encoding="utf-8")
    add_file(restored, restored / GOLDEN_ANSWERS)
    found = [finding.text for finding in verify(restored, golden=True).findings]
    assert len(found) == clear
    assert all(entry["name"] in text for text in found)


IDS, MARGINS = [1] * TOKENS, [1.0] * TOKENS


@pytest.mark.parametrize(
    ("values", "place"),
    [
        ({"answers": [{"name": "x"}]}, "answers[0]"),
        ({"answers": [{"name": "x", "token_ids": [], "margins": []}]}, "answers[0]"),
        ({"answers": [{"name": "x", "token_ids": None, "margins": MARGINS}]}, "answers[0]"),
        ({"answers": [{"name": "x", "token_ids": IDS, "margins": ["a"] * TOKENS}]}, "answers[0]"),
        ({"answers": [{"name": ["x"], "token_ids": IDS, "margins": MARGINS}]}, "answers[0]"),
        ({"answers": ["x"]}, "answers[0]"),
        ({"answers": []}, "answers: expected"),
        ({}, "answers: expected"),
        ({"format_version": 2}, "format_version"),
    ],
)
def test_a_file_that_is_damaged_or_says_nothing_is_refused_by_name(
    restored: Path, values: dict[str, Any], place: str
) -> None:
    (restored / GOLDEN_ANSWERS).write_text(json.dumps({"format_version": 1, **values}))
    with pytest.raises(RejectedError) as error:
        differing_answers(restored)
    assert f"{GOLDEN_ANSWERS}: {place}" in str(error.value)


def test_a_damaged_file_is_a_finding(restored: Path) -> None:
    (restored / GOLDEN_ANSWERS).write_text('{"format_version": 1, "answers": [{"name": "x"}]}')
    add_file(restored, restored / GOLDEN_ANSWERS)
    found = verify(restored, golden=True).errors
    assert [finding.where for finding in found] == [GOLDEN_ANSWERS]


def test_a_damaged_folder_gets_no_answers(tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(prepare(small_model(tmp_path / "in"), Request(QuantSpec(4, 64)), "small"), out)
    (out / "config.json").write_text("{}")
    assert verify(out, golden=True).errors
    assert not (out / GOLDEN_ANSWERS).exists()
