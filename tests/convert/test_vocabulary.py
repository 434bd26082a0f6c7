"""Cut vocabularies: beside tiktoken, the tokenizers library, mlx-lm and the whole model."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tokenizers

from apertus_mlx import convert_model, verify
from apertus_mlx.checkpoint.config import read_config
from apertus_mlx.cli.app import app
from apertus_mlx.convert.check.verify import Verification
from apertus_mlx.convert.evaluation.texts import open_text
from apertus_mlx.convert.job import prepare
from apertus_mlx.convert.plan.policy import Request
from apertus_mlx.convert.vocabulary.byte_pairs import read_byte_pairs
from apertus_mlx.convert.write.manifest import MANIFEST
from apertus_mlx.errors import ApertusError, RejectedError, UsageError
from apertus_mlx.hub.demo import model_dir
from apertus_mlx.quant.spec import QuantSpec
from apertus_mlx.text.tokenizer import Tokenizer
from apertus_mlx.tools import Conversion
from tests.builders import config_4x, write_checkpoint
from tests.convert_builders import read_folder
from tests.real_tokenizers import SPECIAL_TOKENS, tekken_path
from tests.text.test_real_tokenizers import SENTENCES, locale_texts

DEMO = 1792
KEPT = 1024
GERMAN = "Die Hauptstadt der Schweiz ist Bern. Der Zug fährt um halb acht nach Zürich."
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Conversion:
    """The embedded model with its first tokens."""
    return convert_model(None, tmp_path_factory.mktemp("cut") / "prefix", vocab=KEPT)


@pytest.fixture(scope="module")
def german(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "de.txt"
    path.write_text(GERMAN)
    return path


@pytest.fixture(scope="module")
def chosen(tmp_path_factory: pytest.TempPathFactory, german: Path) -> Conversion:
    """The embedded model with the tokens of a text."""
    return convert_model(None, tmp_path_factory.mktemp("cut") / "chosen", vocab_for=german)


def library(folder: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


def kept_ids(cut: Conversion) -> list[int]:
    """Ids in the whole model, by the names that the tokenizers library reads."""
    whole, part = library(model_dir()), library(cut.output)
    return [whole.token_to_id(part.id_to_token(i)) for i in range(part.get_vocab_size())]


def test_a_prefix_is_the_first_rows_and_ids(prefix: Conversion) -> None:
    before, after = read_folder(model_dir()), read_folder(prefix.output)
    table = before.pop("model.embed_tokens.weight")
    cut = after.pop("model.embed_tokens.weight")
    assert after == before
    assert cut.shape == (KEPT, table.shape[1])
    assert cut.data == table.data[: len(cut.data)]
    assert read_config(prefix.output).vocab_size == KEPT
    assert kept_ids(prefix) == list(range(KEPT))


def test_planned_bytes_are_written(prefix: Conversion) -> None:
    for file in prefix.plan.files:
        assert (prefix.output / file.name).stat().st_size == file.size_bytes
    whole = sum(path.stat().st_size for path in model_dir().glob("*.safetensors"))
    cut = sum(file.size_bytes for file in prefix.plan.files)
    # But for the headers, which have other numbers and the type of the file in them.
    assert whole - cut == pytest.approx((DEMO - KEPT) * 256 * 2, abs=200)


def test_templates_and_control_tokens_stay(prefix: Conversion, chosen: Conversion) -> None:
    whole, template = open_text(model_dir())
    assert template is not None
    prompt = template.render(QUESTION)
    controls = [token_id for token_id in prompt if token_id in whole.special_ids]
    for cut in (prefix, chosen):
        tokenizer, own = open_text(cut.output)
        assert own is not None
        ids = own.render(QUESTION)
        assert [token_id for token_id in ids if token_id in tokenizer.special_ids] == controls
        assert tokenizer.decode(ids, skip_special=False) == whole.decode(prompt, skip_special=False)
        assert tokenizer.special_ids == whole.special_ids


def test_the_tokens_of_a_text_are_those_that_it_had(chosen: Conversion) -> None:
    whole, part = library(model_dir()), library(chosen.output)
    assert part.encode(GERMAN).tokens == whole.encode(GERMAN).tokens
    size = part.get_vocab_size()
    assert size % 64 == 0
    assert size < DEMO
    assert read_config(chosen.output).vocab_size == size
    ids = kept_ids(chosen)
    assert ids == sorted(ids)
    assert ids[:330] == list(range(330))
    assert set(whole.encode(GERMAN).ids) <= set(ids)
    for text in SENTENCES:
        assert open_text(chosen.output)[0].decode(part.encode(text).ids) == text


def test_logits_of_mlx_lm_are_those_of_the_whole_model(
    prefix: Conversion, chosen: Conversion
) -> None:
    utils = pytest.importorskip("mlx_lm.utils")
    whole, _ = utils.load_model(model_dir())
    for cut in (prefix, chosen):
        ids = kept_ids(cut)
        part, _ = utils.load_model(cut.output)
        new = [i for i in range(len(ids)) if i % 7 == 3][:40]
        expected = whole(mx.array([[ids[i] for i in new]]))[0][:, mx.array(ids)]
        found = part(mx.array([new]))[0]
        assert mx.allclose(found, expected, rtol=1e-3, atol=0.05).item()
        assert (found.argmax(-1) == expected.argmax(-1)).sum().item() >= 39


def test_codes_are_cut_as_weights_are(tmp_path: Path, prefix: Conversion) -> None:
    whole = convert_model(None, tmp_path / "whole", bits=4).output
    codes_cut = convert_model(whole, tmp_path / "codes", vocab=KEPT).output
    weights_cut = convert_model(prefix.output, tmp_path / "weights", bits=4).output
    assert read_folder(codes_cut) == read_folder(weights_cut)
    found: Verification = verify(codes_cut)
    assert not found.errors
    table = read_folder(codes_cut)["model.embed_tokens.weight"]
    assert table.shape[0] == KEPT


def test_windows_of_a_calibration_are_in_the_cut_vocabulary(prefix: Conversion) -> None:
    found, expected = (
        prepare(folder, Request(QuantSpec(4, 64), method="gptq", vocab=size), "x").calibration
        for folder, size in ((model_dir(), KEPT), (prefix.output, None))
    )
    assert found is not None and expected is not None
    assert np.array_equal(found.sample.windows, expected.sample.windows)
    assert found.sample.windows.max() < KEPT


@pytest.mark.nightly
@pytest.mark.parametrize(
    "options",
    [{"bits": 4, "method": "gptq", "smooth": True}, {"target_bpw": 3.5, "method": "gptq"}],
)
def test_calibration_reads_the_cut_vocabulary(tmp_path: Path, options: dict[str, Any]) -> None:
    """As when the vocabulary is cut first, and what comes out is calibrated."""
    text = tmp_path / "en.txt"
    names = ("Bern", "Chur", "Basel", "Lugano", "Aarau")
    text.write_text("\n\n".join(f"The train to {name} leaves at 7." for name in names))
    options = {**options, "group_size": 32, "calibration": text}
    config = config_4x(vocab_size=DEMO, tie_word_embeddings=True)
    source = write_checkpoint(tmp_path / "source", config, dtype=mx.bfloat16, tokenizer=False)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(model_dir() / name, source)
    first = convert_model(source, tmp_path / "first", vocab=KEPT).output
    expected = convert_model(first, tmp_path / "expected", **options).output
    at_once = convert_model(source, tmp_path / "at-once", vocab=KEPT, **options).output
    assert read_folder(at_once) == read_folder(expected)
    quality = json.loads((at_once / MANIFEST).read_bytes())["quality"]
    assert quality["overall"]["kl_mean"] > 0


def test_inflation_is_what_the_library_counts(
    tmp_path: Path, german: Path, prefix: Conversion, capsys: pytest.CaptureFixture[str]
) -> None:
    english = tmp_path / "en.jsonl"
    english.write_text(
        json.dumps({"language": "en", "messages": [{"role": "user", "content": "What? Why?"}]})
    )
    target = tmp_path / "out"
    app(
        ["convert", "--vocab", str(KEPT), "--text", str(german), "--text", str(english), "--plan",
         "--json", "--out", str(target)],
        standalone_mode=False,
    )  # fmt: skip
    assert not target.exists()
    told = json.loads(capsys.readouterr().out)["vocabulary"]
    assert (told["tokens"], told["source_tokens"], told["chosen_by"]) == (KEPT, DEMO, "prefix")
    backends = library(model_dir()), library(prefix.output)
    for language, text in (("de", GERMAN), ("en", "What? Why?")):
        before, after = (
            len(backend.encode(text, add_special_tokens=False).ids) for backend in backends
        )
        assert told["inflation"][language] == {
            "tokens_before": before, "tokens_after": after, "factor": round(after / before, 4),
        }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab": 1000}, "--vocab 1000: expected a multiple of 64"),
        ({"vocab": 2048}, "--vocab 2048: the vocabulary has 1792 tokens"),
        ({"vocab": 320}, "the least is 384"),
        ({"vocab": KEPT, "vocab_for": "x.txt"}, "--vocab-for: leave out --vocab"),
        ({"text": "x.txt"}, "--text: only --vocab"),
        ({"vocab_for": "x.txt"}, "x.txt: no such file"),
    ],
)
def test_what_cannot_be_cut_is_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ApertusError, match=message):
        convert_model(None, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def write_vocabulary(folder: Path, merges: Sequence[tuple[str, str]], *more: str) -> Path:
    """The embedded model's file with other merges and, above its bytes, other tokens."""
    value = json.loads((model_dir() / "tokenizer.json").read_bytes())
    vocab = {name: i for name, i in value["model"]["vocab"].items() if i < 330}
    value["model"]["vocab"] = vocab | {name: 330 + i for i, name in enumerate(more)}
    value["model"]["merges"] = [list(merge) for merge in merges]
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(value))
    return path


def test_a_token_without_a_split_is_refused(tmp_path: Path) -> None:
    """Made of a token above it, or of none: the rest would not be complete."""
    path = write_vocabulary(tmp_path, [("a", "b"), ("ab", "c")], "abc", "ab")
    with pytest.raises(RejectedError, match=r"token 330 \('abc'\) does not split"):
        read_byte_pairs(path).prefix(332)
    path = write_vocabulary(tmp_path, [("a", "b")], "ab", "xyz")
    with pytest.raises(RejectedError, match=r"token 331 \('xyz'\) does not split"):
        read_byte_pairs(path).closure([331], 384)
    assert list(read_byte_pairs(path).prefix(331)) == list(range(331))


def test_closed_under_the_merges_that_a_text_goes_through(tmp_path: Path) -> None:
    """`abcd` is merged by way of `bc`, though its first split would be `ab` and `cd`."""
    merges = [("b", "c"), ("a", "b"), ("c", "d"), ("ab", "cd"), ("bc", "d"), ("a", "bcd")]
    path = write_vocabulary(tmp_path, merges, "bc", "ab", "cd", "bcd", "abcd")
    pairs = read_byte_pairs(path)
    kept = pairs.closure([334], 333)
    assert kept[330:].tolist() == [330, 333, 334]
    whole = library(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(pairs.cut(kept))
    cut = library(tmp_path)
    for text in ("abcd", "xabcdx"):
        assert cut.encode(text).tokens == whole.encode(text).tokens


# --- the released vocabulary --------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks() -> dict[bytes, int]:
    path = tekken_path()
    assert path is not None
    return {
        base64.b64decode(entry["token_bytes"]): entry["rank"]
        for entry in json.loads(path.read_bytes())["vocab"]
    }


def require_equal_to_tiktoken(
    folder: Path, target: Path, ranks: dict[bytes, int], size: int, texts: Sequence[str]
) -> None:
    """The first ids are a byte-pair encoding, and as tiktoken has it with so many ranks."""
    tiktoken = pytest.importorskip("tiktoken")
    pairs = read_byte_pairs(folder / "tokenizer.json")
    assert pairs.floor == 1256
    target.mkdir()
    (target / "tokenizer.json").write_bytes(pairs.cut(pairs.prefix(size)))
    reference = tiktoken.Encoding(
        "cut",
        pat_str=pairs.source["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"],
        mergeable_ranks={b: rank for b, rank in ranks.items() if rank < size - SPECIAL_TOKENS},
        special_tokens={},
    )
    tokenizer = Tokenizer.load(target, vocab_size=size, bos_token_id=1)
    for text in texts:
        ids = tokenizer.encode(text)
        expected = np.array(reference.encode_ordinary(text), np.int64) + SPECIAL_TOKENS
        assert ids == expected.tolist()
        assert tokenizer.decode(ids) == text


def test_the_first_ids_of_the_released_vocabulary(
    real_tokenizers: dict[str, Path], ranks: dict[bytes, int], tmp_path: Path
) -> None:
    texts = [*SENTENCES, *(text for _, text in list(locale_texts())[::80])]
    require_equal_to_tiktoken(real_tokenizers["v1.1"], tmp_path / "cut", ranks, 32_768, texts)


@pytest.mark.nightly
@pytest.mark.parametrize("size", [1280, 32_768, 65_536])
def test_all_locales_with_the_first_ids(
    real_tokenizers: dict[str, Path], ranks: dict[bytes, int], tmp_path: Path, size: int
) -> None:
    texts = [*SENTENCES, *(text for _, text in locale_texts())]
    assert len(texts) >= 160
    require_equal_to_tiktoken(real_tokenizers["v1"], tmp_path / "cut", ranks, size, texts)


def test_transformers_reads_a_cut_tokenizer(prefix: Conversion) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(prefix.output)
    assert (
        tokenizer.encode(GERMAN, add_special_tokens=False)
        == library(prefix.output).encode(GERMAN, add_special_tokens=False).ids
    )
    assert len(tokenizer) == KEPT
    with pytest.raises(UsageError):
        convert_model(prefix.output, prefix.output.with_name("more"), vocab=KEPT + 64)
