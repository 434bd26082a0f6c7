"""Likelihoods beside log-softmax in float64, PyTorch's model where it is, and plain definitions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from apertus_mlx.generation.model_folder import open_folder
from apertus_mlx.generation.options import RunOptions
from apertus_mlx.hub.demo import model_dir
from apertus_mlx.measure.tasks.kept_answers import KeptAnswers
from apertus_mlx.measure.tasks.likelihood import Likelihood, Scored, likelihoods, windows
from apertus_mlx.measure.tasks.opened import OpenModel, open_model
from apertus_mlx.measure.tasks.pairs import joined
from apertus_mlx.model.apertus import Model
from apertus_mlx.text.tokenizer import Tokenizer
from tests.builders import config_4x, write_checkpoint

CONTEXT = 64


@pytest.fixture(scope="module", params=["mlx", "cpu"])
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[OpenModel]:
    folder = write_checkpoint(tmp_path_factory.mktemp("model") / "tiny", config_4x())
    on_cpu = RunOptions(compute="cpu", precision="float32")
    settings = {"cpu": on_cpu, "mlx": RunOptions(compute="mlx", dtype="float32")}
    with open_model(folder, settings[request.param], CONTEXT) as opened:
        yield opened


def directly(model: OpenModel, ids: list[int], start: int) -> Likelihood:
    """One pass over all ids, and the definition in float64."""
    logits = np.array(model.loaded.model(mx.array([ids[:-1]]))[0].astype(mx.float32), np.float64)
    table = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
    table -= logits.max(-1, keepdims=True)
    rows = range(start - 1, len(ids) - 1)
    best = [int(logits[row].argmax()) == ids[row + 1] for row in rows]
    return Likelihood(sum(table[row, ids[row + 1]] for row in rows), all(best))


def scored(model: OpenModel, rows: list[Scored], batch_size: int = 4) -> list[Likelihood]:
    found = dict(likelihoods(model, rows, batch_size))
    assert sorted(found) == list(range(len(rows)))
    return [found[number] for number in range(len(rows))]


def rows_of(rng: np.random.Generator) -> list[Scored]:
    """Questions with several choices of their own lengths, and texts that stand alone."""
    rows = []
    for _ in range(3):
        question = [1, *rng.integers(74, 384, rng.integers(1, 20)).tolist()]
        rows += [
            Scored([*question, *rng.integers(74, 384, size).tolist()], len(question))
            for size in (1, 3, 7)
        ]
    rows += [Scored([1, *rng.integers(74, 384, size).tolist()], 1) for size in (1, 2, 5, 11, 30)]
    return rows


def test_likelihoods_are_their_definition(model: OpenModel) -> None:
    rows = rows_of(np.random.default_rng(3))
    for found, (ids, start) in zip(scored(model, rows), rows, strict=True):
        expected = directly(model, list(ids), start)
        assert found.log_probability == pytest.approx(expected.log_probability, abs=1e-4)
        assert found.greedy == expected.greedy


def test_greedy_is_what_greedy_choice_writes(model: OpenModel) -> None:
    ids = [1, 100, 101, 102]
    for _ in range(4):
        ids.append(int(np.array(model.loaded.model(mx.array([ids]))[0, -1]).argmax()))
    other = [*ids[:-1], 75 if ids[-1] != 75 else 76]
    found = scored(model, [Scored(ids, 4), Scored(other, 4), Scored(ids, len(ids))])
    assert [each.greedy for each in found] == [True, False, True]
    assert found[2].log_probability == 0.0


def test_a_long_context_loses_its_front_and_a_long_continuation_nothing(model: OpenModel) -> None:
    """As lm-eval cuts; where a prefix would be left empty every token still counts."""
    rng = np.random.default_rng(4)
    ids = [1, *rng.integers(74, 384, 150).tolist()]
    [late, all_of_it] = scored(model, [Scored(ids, 141), Scored(ids, 1)])
    # 64 tokens go in, the last of them predicts the last token.
    assert late.log_probability == pytest.approx(
        directly(model, ids[-65:], 55).log_probability, abs=1e-4
    )
    parts = [(ids[:65], 1), (ids[64:129], 1), (ids[86:], 43)]
    expected = sum(directly(model, part, start).log_probability for part, start in parts)
    assert all_of_it.log_probability == pytest.approx(expected, abs=1e-3)


@given(st.integers(2, 60), st.integers(1, 9), st.data())
def test_windows_judge_each_token_once(length: int, most: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(1, length))
    judged = []
    for inputs, count in windows(range(length), start, most):
        assert 1 <= count <= len(inputs) <= most
        # As much context as there is room for.
        assert len(inputs) == most or inputs[0] == 0
        judged += [each + 1 for each in inputs[-count:]]
    assert judged == list(range(start, length))


def test_one_context_is_computed_once(model: OpenModel, monkeypatch: pytest.MonkeyPatch) -> None:
    if not isinstance(model.loaded.model, Model):
        return  # counts what the MLX model is given
    positions = 0
    decoder = type(model.loaded.model.model)
    before = decoder.__call__

    def counted(self: object, ids: mx.array, *rest: object) -> mx.array:
        nonlocal positions
        positions += ids.size
        return before(self, ids, *rest)

    monkeypatch.setattr(decoder, "__call__", counted)
    question = [1, *range(100, 140)]
    scored(model, [Scored([*question, choice], len(question)) for choice in range(80, 90)])
    assert positions == len(question) - 1 + 10


@pytest.mark.nightly
def test_like_transformers(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    rows = rows_of(np.random.default_rng(5))
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        model_dir(), dtype=torch.float32
    ).eval()
    with open_model(model_dir(), RunOptions(compute="mlx", dtype="float32")) as opened:
        found = scored(opened, rows)
    for value, (ids, start) in zip(found, rows, strict=True):
        with torch.no_grad():
            logits = reference(torch.tensor([ids])).logits[0].double()
        table = torch.log_softmax(logits, -1)
        expected = sum(float(table[at - 1, ids[at]]) for at in range(start, len(ids)))
        assert value.log_probability == pytest.approx(expected, abs=1e-3)


# --- a context and what follows it


@pytest.fixture(
    scope="module", params=["embedded", pytest.param("released", marks=pytest.mark.nightly)]
)
def merging(request: pytest.FixtureRequest) -> Tokenizer:
    if request.param == "embedded":
        return open_folder(model_dir()).tokenizer
    folder = request.getfixturevalue("real_tokenizers")["v1"]
    return Tokenizer.load(folder, vocab_size=131_072, bos_token_id=1)


@pytest.mark.parametrize(
    ("context", "continuation", "prefix"),
    [
        ("Question: how many?\nAnswer:", " eight", True),
        ("The sea is ", "blue", True),
        ("", "Hello", True),
        # One token reaches across: those of the context are no beginning of those of both.
        ("The country is Fr", "ance", False),
        ("What is the capi", "tal of Peru?", False),
    ],
)
def test_nothing_of_a_continuation_is_left_out(
    merging: Tokenizer, context: str, continuation: str, prefix: bool
) -> None:
    ids, start = joined(merging, [1], context, continuation)
    assert ids == [1, *merging.encode(context + continuation)]
    alone = merging.encode(context.rstrip())
    assert (ids[1:start] == alone) == prefix
    judged = merging.decode(ids[start:])
    assert judged.endswith(continuation)
    assert len(merging.decode(ids[1:start])) <= len(context.rstrip())


# --- kept answers


def test_answers_are_kept_and_an_unfinished_line_is_not(tmp_path: Path) -> None:
    path = tmp_path / "kept.jsonl"
    KeptAnswers(path, "one").keep("a", [-1.5, True])
    KeptAnswers(path, "two").keep("a", "text\nof two lines")
    with path.open("ab") as file:
        file.write(b'{"model": "one", "request": "b", "ans')
    kept = KeptAnswers(path, "one")
    assert (kept.find("a"), kept.find("b")) == ([-1.5, True], None)
    kept.keep("b", "é")
    assert KeptAnswers(path, "one").find("b") == "é"
    assert KeptAnswers(path, "two").find("a") == "text\nof two lines"
    values = [json.loads(line) for line in path.read_text("utf-8").splitlines() if line[-1] == "}"]
    assert [value["request"] for value in values] == ["a", "a", "b"]
