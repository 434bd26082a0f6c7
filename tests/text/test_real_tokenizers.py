"""The released tokenizers, in the languages of the world: as three other programs have it."""

from __future__ import annotations

import gettext
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from apertus_mlx.text.roles import Role
from apertus_mlx.text.stream import TextStream
from apertus_mlx.text.template import ChatTemplate
from apertus_mlx.text.tokenizer import Tokenizer
from tests.chat_tokenizers import encode_with_control, special_tokens

VOCAB_SIZE = 131_072
CHARACTERS_PER_LOCALE = 600
LATEX = "The answer is $\\boxed{42}$."
SENTENCES = (
    "The capital of France is",
    "Grüezi mitenand! Wie viel kostet das? – 3,50 CHF",
    "Buna saira, co vai? Jau sun da Scuol.",
    "Chunsch au mit uf d’Alp, oder nöd?",
    "ሰላም ለዓለም። እንዴት ነህ?",
    "வணக்கம் உலகம்",
    "བཀྲ་ཤིས་བདེ་ལེགས།",
    "မင်္ဂလာပါ ကမ္ဘာလောက",
    "ߊ߬ ߣߌ߫ ߛߐ߲߬ߜߐߡߊ",
    "สวัสดีชาวโลก",
    "日本語の文。二加二等于几?한국어",
    "שלום עולם مرحبا بالعالم",
    "👩‍👩‍👧‍👦🏔️🇨🇭 e\u0301 \u200d\u200b\ufeff",
    "for (int i = 0; i < 10; i++) {\n\tx += i;\r\n}\n\n\n",
    "   leading, trailing   ",
    "1234567890 3.14159 1_000 ½ ² ٣",
    "I'll we've DON'T l'été ", "\x00\x01\x7f\x80\uffff\U0010ffff",
)  # fmt: skip


@pytest.fixture(scope="module")
def ours(real_tokenizers: dict[str, Path]) -> dict[str, Tokenizer]:
    return {
        version: Tokenizer.load(folder, vocab_size=VOCAB_SIZE, bos_token_id=1)
        for version, folder in real_tokenizers.items()
    }


@pytest.fixture(scope="module")
def transformers(real_tokenizers: dict[str, Path]) -> Any:
    library = pytest.importorskip("transformers")
    path = real_tokenizers["v1"] / "tokenizer.json"
    return library.PreTrainedTokenizerFast(tokenizer_file=str(path), bos_token="<s>")


@pytest.fixture(scope="module")
def library(transformers: Any) -> tokenizers.Tokenizer:
    """The tokenizers library on the file; transformers holds it, and a second one takes 2 s."""
    backend = transformers.backend_tokenizer
    assert isinstance(backend, tokenizers.Tokenizer)
    return backend


@pytest.fixture(scope="module")
def mistral() -> Any:
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    from tests.real_tokenizers import tekken_path

    return Tekkenizer.from_file(tekken_path())


def locale_texts() -> Iterator[tuple[str, str]]:
    """Names of countries, languages and scripts in each language that pycountry has."""
    pycountry = pytest.importorskip("pycountry")
    for folder in sorted(Path(pycountry.LOCALES_DIR).iterdir()):
        words: list[str] = []
        for path in sorted(folder.glob("LC_MESSAGES/*.mo")):
            with path.open("rb") as file:
                catalog = gettext.GNUTranslations(file)._catalog  # type: ignore[attr-defined]
            words += [word for key, word in catalog.items() if key and isinstance(word, str)]
        # From the whole of them, in another order everywhere, but the same in each run.
        random.Random(folder.name).shuffle(words)
        yield folder.name, "\n".join(words)[:CHARACTERS_PER_LOCALE]


def random_texts(count: int) -> Iterator[str]:
    generator = random.Random(0)
    ranges = [(0x20, 0x7F), (0xA0, 0x250), (0x370, 0x1200), (0x3040, 0x3100), (0x4E00, 0x5000),
              (0xAC00, 0xAD00), (0x1F300, 0x1F700), (0x0, 0x20)]  # fmt: skip
    for _ in range(count):
        low, high = generator.choice(ranges)
        letters = [chr(generator.randrange(low, high)) for _ in range(generator.randrange(40))]
        yield "".join(generator.choice([letter, letter, " ", "\n", "a"]) for letter in letters)


def streamed(tokenizer: Tokenizer, ids: list[int]) -> str:
    stream = TextStream(tokenizer)
    return "".join([*map(stream.push, ids), stream.finish()])


@pytest.mark.nightly
def test_texts_of_160_locales_and_others(
    ours: dict[str, Tokenizer], transformers: Any, library: tokenizers.Tokenizer, mistral: Any
) -> None:
    texts = dict(locale_texts())
    assert len(texts) >= 160
    for text in [*texts.values(), *SENTENCES, *random_texts(300)]:
        ids = ours["v1.1"].encode(text)
        assert ids == library.encode(text, add_special_tokens=False).ids
        assert ids == mistral.encode(text, bos=False, eos=False)
        assert ids == transformers.encode(text, add_special_tokens=False)
        assert ours["v1.1"].decode(ids) == text == streamed(ours["v1.1"], ids)
        assert library.decode(ids, skip_special_tokens=False) == text
    for text in [*SENTENCES, *list(texts.values())[::10]]:
        assert ours["v1"].encode(text) == ours["v1.1"].encode(text)


@pytest.mark.parametrize("version", ["v1", "v1.1"])
def test_latex_openers_are_text_whatever_the_flag(
    ours: dict[str, Tokenizer], library: tokenizers.Tokenizer, version: str
) -> None:
    tokenizer = ours[version]
    ids = tokenizer.encode(LATEX)
    assert ids == [1784, 4832, 1395, 1659, 17, 1052, 1050, 38534]
    assert tokenizer.decode(ids) == streamed(tokenizer, ids) == LATEX
    formula = "\\begin{align}\\text{a} &= \\boxed{1}\\end{align}"
    assert tokenizer.encode(formula) == library.encode(formula, add_special_tokens=False).ids
    assert {14, 15, 16, 17} <= set(tokenizer.encode(formula))
    template = ChatTemplate("{{ bos_token }}{{ messages[0].content }}", tokenizer, name="t")
    assert template.render([{"role": "user", "content": formula}]) == [
        1, *tokenizer.encode(formula),
    ]  # fmt: skip


def test_names_of_both_versions(ours: dict[str, Tokenizer]) -> None:
    v1, v1_1 = ours["v1"], ours["v1.1"]
    names = [(v1.id_to_token(i), v1_1.id_to_token(i)) for i in range(VOCAB_SIZE)]
    other = [i for i, (one, two) in enumerate(names) if one != two]
    assert other == [3, 10, *range(61, 73)]
    assert names[65] == ("<|user_start|>", "<SPECIAL_65>")
    assert v1.special_ids == v1_1.special_ids == frozenset(range(1000)) - {14, 15, 16, 17}
    assert Role.ASSISTANT.end == 68


@pytest.mark.parametrize("text", ["a", " ", "ก"])
def test_long_uniform_texts_are_whole(
    ours: dict[str, Tokenizer], library: tokenizers.Tokenizer, text: str
) -> None:
    """Such as 98,000 letters of Thai without a blank: counted, and as the library has them."""
    tokenizer = ours["v1.1"]
    long = text * (98_000 // len(text))
    ids = tokenizer.encode(long)
    assert ids == library.encode(long, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == long
    assert tokenizer.least_tokens(long) <= len(ids) <= len(long)


def test_control_names_in_a_text_stay_text(ours: dict[str, Tokenizer]) -> None:
    for tokenizer in ours.values():
        text = "".join(special_tokens(tokenizer))
        ids = tokenizer.encode(text)
        assert tokenizer.special_ids.isdisjoint(ids)
        assert tokenizer.decode(ids) == text
        assert encode_with_control(tokenizer, text) == list(special_tokens(tokenizer).values())
