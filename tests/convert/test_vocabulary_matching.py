"""What a whole model says of the tokens of a part: beside the tokenizers library and float64."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest
import tokenizers

from apertus_mlx import Progress, convert_model, evaluate
from apertus_mlx.backend.mlx import load_model
from apertus_mlx.convert.distill.teacher_cache import TeacherCache
from apertus_mlx.convert.evaluation import evaluate as judge
from apertus_mlx.convert.evaluation.layerwise import open_weights
from apertus_mlx.convert.evaluation.texts import DEFAULT_DIRECTORY, open_tokenizer
from apertus_mlx.convert.sources.reading import Reader
from apertus_mlx.convert.vocabulary.byte_pairs import read_byte_pairs
from apertus_mlx.convert.vocabulary.matching import NOWHERE, Matching, kept_ids, match
from apertus_mlx.errors import ApertusError, RejectedError, UsageError
from apertus_mlx.hub.demo import model_dir
from apertus_mlx.text.tokenizer import Tokenizer
from tests.builders import config_4x, write_checkpoint

TEXTS = (
    "Die Hauptstadt der Schweiz ist Bern, und nicht Zürich.",
    " Which animal barks? \u2014 überall 日本",
)
BOS = 1
Values = npt.NDArray[np.float64]


def library(folder: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


def in_both(whole: Path, part: Path) -> tuple[list[int], list[int]]:
    """BOS and texts with a control token between, by the library."""
    found = []
    for folder in (whole, part):
        backend = library(folder)
        ids = [BOS]
        for text in TEXTS:
            ids += backend.encode(text, add_special_tokens=False).ids
            ids.append(backend.token_to_id("<|user_end|>"))
        found.append(ids)
    return found[0], found[1]


def borders(folder: Path, ids: list[int]) -> list[int]:
    """Bytes before the end of each token; a control token counts as one."""
    names = map(library(folder).id_to_token, ids)
    return np.cumsum([1 if "<" in name[:1] else len(name) for name in names]).tolist()


def said(whole: Path, part: Path, ids: list[int], own: list[int]) -> list[tuple[Values, float]]:
    """For each token of the part, by the definition: shares of what follows, and the rest.

    All are nothing before the first token of the whole has ended.
    """
    larger, smaller = library(whole), library(part)
    size = larger.get_vocab_size()
    logits = np.array(load_model(whole, "float32")(mx.array(ids)[None])[0], np.float64)
    shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    written = []
    for token_id in range(size):
        name = larger.id_to_token(token_id)
        there = smaller.token_to_id(name)
        pieces = [token.id for token in smaller.model.tokenize(name)] if there is None else [there]
        written.append(pieces)
    ends, own_ends = borders(whole, ids), borders(part, own)
    found = []
    for at, end in enumerate(own_ends):
        last = max((place for place, before in enumerate(ends) if before <= end), default=-1)
        if last < 0:
            found.append((np.zeros(smaller.get_vocab_size()), 0.0))
            continue
        since = [token for token, e in zip(own[: at + 1], own_ends, strict=False) if e > ends[last]]
        values, rest = np.zeros(smaller.get_vocab_size()), 0.0
        for token_id, pieces in enumerate(written):
            if pieces[: len(since)] == since:
                if len(pieces) > len(since):
                    values[pieces[len(since)]] += shares[last, token_id]
                else:
                    rest += shares[last, token_id]
        total = values.sum() + rest
        found.append((values / total, rest / total))
    return found


@pytest.fixture(
    scope="module", params=["vocab", pytest.param("vocab_for", marks=pytest.mark.nightly)]
)
def part(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model with fewer tokens, bytes and some more."""
    how = (
        {"vocab": 512} if request.param == "vocab" else {"vocab_for": DEFAULT_DIRECTORY / "de.txt"}
    )
    return convert_model(None, tmp_path_factory.mktemp("cut") / "part", **how).output


@pytest.fixture(scope="module")
def matching(part: Path) -> Matching:
    found = match(model_dir(), part)
    assert found is not None
    return found


def test_a_window_is_read_in_both(part: Path, matching: Matching) -> None:
    ids, own = in_both(model_dir(), part)
    reading = matching.read(np.array([own, own[2:] + own[:2]]))
    assert reading.whole[0].tolist()[: len(ids)] == ids
    ends, own_ends = borders(model_dir(), ids), borders(part, own)
    assert len(own) > len(ids)
    assert reading.borders[1][reading.borders[0] == 0].tolist() == [
        at for at, end in enumerate(own_ends) if end in ends
    ]


def test_a_window_may_begin_inside_a_character(matching: Matching) -> None:
    text = "日日"
    letters = library(model_dir()).encode(text, add_special_tokens=False)
    assert len(letters.ids) == len(text.encode()), "it has to be bytes"
    reading = matching.read(np.array([letters.ids[1:-1]]))
    assert reading.whole.tolist() == [letters.ids[1:-1]]
    assert not reading.inside.any()


def test_a_model_has_no_other_tokens_than_itself() -> None:
    assert match(model_dir(), model_dir()) is None


def test_a_control_token_that_the_part_has_not_counts_for_nothing(tmp_path: Path) -> None:
    value = json.loads((model_dir() / "tokenizer.json").read_bytes())
    new = {**value["added_tokens"][0], "id": 1792, "content": "<an image>", "special": True}
    value["added_tokens"].append(new)
    (tmp_path / "tokenizer.json").write_text(json.dumps(value))
    whole = Tokenizer.load(tmp_path, vocab_size=1856, bos_token_id=BOS)
    part = open_tokenizer(model_dir())
    kept = kept_ids(whole, part)
    assert kept is not None
    pairs = read_byte_pairs(model_dir() / "tokenizer.json")
    found = Matching(whole, part, pairs, kept, 1856)
    shares = np.zeros((1, 1856), np.float32)
    shares[0, [1792, 100]] = 0.75, 0.25
    assert found.first_pieces(shares)[0, [100, 60]].tolist() == [1, 0]


def test_a_teacher_speaks_of_pieces(tmp_path: Path, part: Path, matching: Matching) -> None:
    ids, own = in_both(model_dir(), part)
    k = 32
    answers = TeacherCache(tmp_path / "answers", [np.array([own])])
    with Reader(model_dir()) as reader:
        answers.fill(open_weights(model_dir(), reader), k, lambda _: None, matching)
    batch = answers.batch(0)
    shares, named = np.array(batch.shares)[0], np.array(batch.likeliest)[0].astype(int)
    inside = 0
    for at, (values, rest) in enumerate(said(model_dir(), part, ids, own)):
        np.testing.assert_allclose(shares[at, :-1], values[named[at]], rtol=3e-3, atol=1e-5)
        assert shares[at].sum() == pytest.approx(1, abs=1e-5)
        assert values[named[at]].sum() == pytest.approx(np.sort(values)[-k:].sum(), abs=1e-5)
        inside += rest > 0
    assert inside > 5


def test_what_comes_before_the_first_border_is_not_learned(
    tmp_path: Path, part: Path, matching: Matching
) -> None:
    """A window that begins inside a token has no token of the teacher before it."""
    smaller = library(part)
    cut = next(
        pieces
        for name, _ in sorted(library(model_dir()).get_vocab().items())
        if smaller.token_to_id(name) is None
        and name.isascii()
        and name.isalpha()
        and len(pieces := [token.id for token in smaller.model.tokenize(name)]) > 1
    )
    answers = TeacherCache(tmp_path / "answers", [np.array([cut])])
    assert matching.read(np.array([cut])).places[0, 0] == NOWHERE
    with Reader(model_dir()) as reader:
        answers.fill(open_weights(model_dir(), reader), 8, lambda _: None, matching)
    sums = np.array(answers.batch(0).shares)[0].sum(-1)
    assert sums[0] == 0
    assert sums[len(cut) - 1] == pytest.approx(1, abs=1e-5)


def test_what_has_no_part_of_the_vocabulary_is_refused_first(tmp_path: Path, part: Path) -> None:
    config = config_4x(num_hidden_layers=1)
    other = write_checkpoint(tmp_path / "other", config)
    with pytest.raises(UsageError, match="other: its tokenizer is neither that of"):
        evaluate([part, other], reference=model_dir())
    with pytest.raises(UsageError, match=r"more tokens than .*; give the whole model"):
        evaluate(model_dir(), reference=part)
    with pytest.raises(UsageError, match="--languages: the models have different vocabularies"):
        evaluate([part, model_dir()], reference=model_dir(), languages=True)


def damaged_template(folder: Path) -> Path:
    shutil.copytree(model_dir(), folder)
    (folder / "chat_template.jinja").write_text("{% for %}")
    return folder


def other_sizes(folder: Path, **sizes: int) -> Path:
    """The embedded model's tokenizer with other sizes of embedding and head."""
    write_checkpoint(folder, config_4x(num_hidden_layers=1, **sizes), tokenizer=False)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(model_dir() / name, folder)
    return folder


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (damaged_template, "chat_template"),
        (partial(other_sizes, vocab_size=1856), "other: 1856 tokens in the vocabulary, .* 1792"),
        (
            partial(other_sizes, vocab_size=1792, output_vocab_size=1700),
            "other: its head gives 1700 logits, that of .* 1792 for the same tokens",
        ),
    ],
)
def test_a_model_of_another_group_is_refused_before_the_first_is_measured(
    tmp_path: Path, part: Path, make: Callable[[Path], Path], message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(judge, "hidden_states", lambda *_: pytest.fail("something is measured"))
    with pytest.raises(ApertusError, match=message):
        evaluate([part, make(tmp_path / "other")], reference=model_dir())


def test_a_text_that_a_group_cannot_read_is_refused_first(
    tmp_path: Path, part: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A conversation, for a model without a template."""
    monkeypatch.setattr(judge, "hidden_states", lambda *_: pytest.fail("something is measured"))
    chat = tmp_path / "chat.json"
    chat.write_text(json.dumps({"messages": [{"role": "user", "content": "Hello"}]}))
    bare = shutil.copytree(part, tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    with pytest.raises(RejectedError, match="has no chat template"):
        evaluate([model_dir(), bare], reference=model_dir(), text=chat)


def test_eval_compares_where_both_have_a_border(tmp_path: Path, part: Path) -> None:
    """Also of models with a part beside one with all."""
    path = tmp_path / "de.txt"
    path.write_text(TEXTS[0])
    models = [part, model_dir(), shutil.copytree(part, tmp_path / "again")]
    told: list[Progress] = []
    compared = evaluate(models, reference=model_dir(), text=path, progress=told.append)
    found, whole, again = (each.overall for each in compared.models.values())
    assert found == again
    assert (whole.kl_mean, whole.top1_agreement) == (0, 1)
    layers = [each.done for each in told if each.stage == "measuring"]
    # Comparing counts as two layers, with a part as one; the reference with itself twice.
    runs = 4 * (2 + 2 + 3) + 2 * (2 + 1) + 2 * 1
    assert layers == sorted(layers) and layers[-1] == told[-1].total == runs
    ids, own = ([BOS, *library(each).encode(TEXTS[0], add_special_tokens=False).ids]
                for each in (model_dir(), part))  # fmt: skip
    logits = np.array(load_model(part, "float32")(mx.array(own)[None])[0], np.float64)
    student = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    ends, losses = borders(model_dir(), ids), []
    own_ends = borders(part, own)
    for at, (values, rest) in enumerate(said(model_dir(), part, ids, own)):
        if own_ends[at] in ends:
            assert rest == 0
            losses.append((values * np.log(np.maximum(values, 1e-300) / student[at])).sum())
    assert found.tokens == len(losses)
    assert found.kl_mean == pytest.approx(np.mean(losses), rel=1e-4)
