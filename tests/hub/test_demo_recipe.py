"""The embedded model's recipe: its facts, corpus, exam and tokenizer, and the shipped folder."""

import json
import re
import subprocess
import sys
from itertools import islice

import pytest

from apertus_mlx.hub.demo import model_dir
from recipes.demo import exam
from recipes.demo.corpus import documents, is_held_out, prompt
from recipes.demo.facts import FACTS, KINDS, LANGUAGES
from recipes.demo.wordings import answers, brief_answer, statements, wordings

MAX_FOLDER_BYTES = 6_000_000


def plain(text: str) -> str:
    """Reduce a question to what asking carelessly leaves of it."""
    return re.sub(r"\W", "", text).casefold()


@pytest.fixture(scope="module")
def asked_in_training() -> set[str]:
    """Every user turn of a large sample of the corpus."""
    turns: set[str] = set()
    for document in islice(documents(3), 15_000):
        for segment in document:
            turns.update(re.findall(r"<\|user_start\|>(.*?)<\|user_end\|>", segment.text))
    return {plain(turn) for turn in turns}


def test_every_fact_has_every_language() -> None:
    assert len({fact.name for fact in FACTS}) == len(FACTS)
    for fact in FACTS:
        assert set(fact.local) == set(LANGUAGES)
        assert all(local.gold for local in fact.local.values())


def test_every_kind_has_enough_wordings_and_one_held_out() -> None:
    for kind in KINDS:
        for language in LANGUAGES:
            options = wordings(kind, language)
            assert len(options) >= 9
            assert any(option.held_out for option in options)
            assert len({option.template for option in options}) == len(options)


def test_every_wording_fills_all_its_slots() -> None:
    for fact in FACTS:
        for language in LANGUAGES:
            texts = [w.ask(fact, language) for w in wordings(fact.kind, language)]
            texts += statements(fact, language)
            assert all("{" not in text and "  " not in text for text in texts)
            assert all(text[0].isupper() or text[0].isdigit() for text in texts)


def test_answers_contain_the_gold_value_and_count_as_right() -> None:
    by_text = {question.text: question for question in exam.questions()}
    for fact in FACTS:
        for language in LANGUAGES:
            gold = fact.local[language].gold
            assert any(value in answers(fact, language) for value in gold)
            assert any(value in brief_answer(fact, language) for value in gold)
            for wording in wordings(fact.kind, language):
                question = by_text.get(wording.ask(fact, language))
                if question is not None and question.language == language:
                    assert exam.is_right(question, answers(fact, language))
                    assert exam.is_right(question, brief_answer(fact, language))


def test_held_out_questions_never_occur_in_training(asked_in_training: set[str]) -> None:
    assert len(asked_in_training) > 5_000
    held_out = {
        plain(wording.ask(fact, language))
        for fact in FACTS
        for language in LANGUAGES
        for wording in wordings(fact.kind, language)
        if is_held_out(fact, language, wording)
    }
    assert len(held_out) > 1_000
    assert not held_out & asked_in_training
    assert not {plain(question.text) for question in exam.questions()} & asked_in_training


def test_corpus_depends_on_the_seed_alone() -> None:
    first = list(islice(documents(7), 200))
    assert first == list(islice(documents(7), 200))
    assert first != list(islice(documents(8), 200))


def test_prompt_has_the_chat_format() -> None:
    assert prompt("Hi", "Be brief.") == (
        "<s><|system_start|>Be brief.<|system_end|><|developer_start|>Deliberation: disabled\n"
        "Tool Capabilities: disabled<|developer_end|><|user_start|>Hi<|user_end|>"
        "<|assistant_start|>"
    )
    assert "Deliberation: enabled\n" in prompt("Hi", deliberate=True)


def test_exam_is_balanced_and_fixed() -> None:
    asked = exam.questions()
    assert asked == exam.questions()
    assert len(asked) == len({question.text for question in asked}) == 100
    for language in LANGUAGES:
        assert sum(question.language == language for question in asked) == 25
    for half in exam.HALVES:
        assert sum(question.half == half for question in asked) == 50
    for kind in KINDS:
        assert sum(question.kind == kind for question in asked) >= 10


def test_scoring_wants_the_gold_value_and_no_other_of_its_kind() -> None:
    question = exam.first_questions()[0]
    assert question.text == "What is the capital of France?"
    assert exam.is_right(question, "The capital of France is Paris.")
    assert not exam.is_right(question, "The capital of France is Rome.")
    assert not exam.is_right(question, "Paris or Rome.")
    assert not exam.is_right(question, "Parisian")
    report = exam.run(lambda text, language: "Paris", exam.first_questions())
    assert report.score() == (3, 4)
    assert report.score(language="it") == (0, 1)


def test_recipe_without_training_needs_the_standard_library_only() -> None:
    code = (
        "import sys, recipes.demo.exam as e; e.questions(); "
        "heavy = {'torch', 'transformers', 'tokenizers', 'numpy'}; "
        "sys.exit(bool(heavy & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.nightly
def test_tokenizer_is_the_shipped_one_and_has_the_apertus_roles() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    from recipes.demo import tokenizer as recipe

    shipped = tokenizers.Tokenizer.from_file(str(model_dir() / "tokenizer.json"))
    same = shipped.to_str() == recipe.build().to_str()
    assert same, "the recipe no longer makes the shipped tokenizer"
    assert shipped.get_vocab_size() == recipe.VOCAB_SIZE
    assert recipe.VOCAB_SIZE % 128 == 0
    names = {1: "<s>", 2: "</s>", 3: "<pad>", 10: "<SPECIAL_10>", 61: "<|system_start|>"}
    names |= {66: "<|user_end|>", 68: "<|assistant_end|>", 70: "<|inner_suffix|>"}
    names |= {72: "<|tools_suffix|>", 73: "<SPECIAL_73>"}
    assert {number: shipped.id_to_token(number) for number in names} == names
    added = shipped.get_added_tokens_decoder()
    assert sorted(added) == list(range(74))
    assert all(token.special for token in added.values())
    assert shipped.encode("Hi").ids[0] == 1
    for text in ("Zürich, 1000 °C", "日本語 🙂\n\n\tend", "\x00\x7f"):
        assert shipped.decode(shipped.encode(text, add_special_tokens=False).ids) == text


def test_shipped_folder_is_small_and_complete() -> None:
    folder = model_dir()
    files = {path.name: path.stat().st_size for path in folder.iterdir()}
    wanted = {"config.json", "generation_config.json", "model.safetensors", "README.md"}
    assert wanted | {"tokenizer.json", "tokenizer_config.json"} <= set(files)
    assert sum(files.values()) <= MAX_FOLDER_BYTES


def test_shipped_config_and_weights_are_in_the_flat_apertus_form() -> None:
    folder = model_dir()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "apertus"
    assert config["rope_scaling"] is None
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 500000.0
    assert config["eos_token_id"] == [2, 68, 72]
    dimensions = (config["hidden_size"], config["intermediate_size"], config["vocab_size"])
    assert all(size % 128 == 0 for size in dimensions)
    with (folder / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    assert header.pop("__metadata__") == {"format": "pt"}
    assert {entry["dtype"] for entry in header.values()} == {"BF16"}
    assert len(header) == 2 + 14 * config["num_hidden_layers"]
    assert header["model.layers.0.mlp.act_fn.alpha_p"]["shape"] == [1]
    assert header["model.layers.0.mlp.act_fn.beta"]["shape"] == []
    assert "lm_head.weight" not in header
