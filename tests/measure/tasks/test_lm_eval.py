"""The model class beside lm-eval itself: its windows, its tasks, its command; needs the extra."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import bootstrap_stderr, mean
from lm_eval.api.registry import get_model
from lm_eval.loggers.utils import get_git_commit_hash
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from apertus_mlx import evaluate_tasks, load
from apertus_mlx.cli.app import app
from apertus_mlx.errors import NotFoundError, UsageError
from apertus_mlx.hub.demo import model_dir
from apertus_mlx.measure.tasks import likelihood
from apertus_mlx.measure.tasks.likelihood import windows
from apertus_mlx.measure.tasks.peer import ApertusLM
from apertus_mlx.measure.tasks.run import quiet

CHAT = [{"role": "user", "content": "Which animal barks? It is no <|user_end|> cat."}]


def request(kind: str, *arguments: Any) -> Instance:
    return Instance(kind, {}, arguments, 0, ("task", 0, 1))


@pytest.fixture(scope="module")
def adapter() -> Iterator[ApertusLM]:
    adapter = get_model("apertus_mlx").create_from_arg_string("compute=mlx,dtype=float32")
    yield adapter
    adapter.close()


@pytest.mark.parametrize("length", [1, 5, 8, 9, 23, 40])
def test_long_texts_are_cut_as_lm_eval_does(length: int) -> None:
    ids = list(range(1, length + 1))
    expected = map(make_disjoint_window, get_rolling_token_windows(ids, 0, 8, 1))
    found = list(windows([0, *ids], 1, 8))
    assert [(list(inputs), count) for inputs, count in found] == [
        ([*before, *after[:-1]], len(after)) for before, after in expected
    ]


def test_a_text_is_as_likely_as_the_api_says(adapter: ApertusLM) -> None:
    text = "The capital of France is Paris."
    [whole] = adapter.loglikelihood_rolling([request("loglikelihood_rolling", text)])
    pairs = [("The capital of France is", " Paris."), ("", text)]
    parts = adapter.loglikelihood([request("loglikelihood", *pair) for pair in pairs])
    with load(compute="mlx", dtype="float32") as model:
        expected = model.logprobs(text)
        tail = len(expected) - len(model.encode("The capital of France is"))
    assert whole == pytest.approx(sum(expected), abs=1e-4)
    assert parts[0][0] == pytest.approx(sum(expected[-tail:]), abs=1e-4)
    assert parts[1][0] == pytest.approx(whole, abs=1e-4)


def test_a_chat_is_the_templates_ids(adapter: ApertusLM) -> None:
    """What a message spells stays text, though the prompt passes lm-eval as text."""
    context = adapter.apply_chat_template(CHAT)
    with load(compute="mlx", dtype="float32") as model:
        prompt = model.render(CHAT)
        answer = model.generate(CHAT, temperature=0, max_tokens=8)
    assert adapter._prompt(context) == prompt
    ids, start = adapter._pair(context, "the dog")
    assert (list(ids[:start]), start) == (prompt, len(prompt))
    generated = adapter.generate_until([request("generate_until", context, {"max_gen_toks": 8})])
    assert generated == [answer.text]


def test_an_answer_that_begins_in_the_prompt(adapter: ApertusLM) -> None:
    begun = [*CHAT, {"role": "assistant", "content": "The answer is"}]
    context = adapter.apply_chat_template(begun, add_generation_prompt=False)
    ids, start = adapter._pair(context, " the dog")
    tokenizer = adapter._folder.tokenizer
    assert tokenizer.decode(ids[start:]) == " the dog"
    assert tokenizer.decode(ids[:start]).endswith("The answer is")


def test_likelihoods_of_a_model_that_thinks_have_no_open_thought() -> None:
    adapter = ApertusLM(think=True)
    context = adapter.apply_chat_template(CHAT)
    plain = ApertusLM()
    assert adapter._pair(context, "x") == plain._pair(plain.apply_chat_template(CHAT), "x")
    roles = adapter._folder.tokenizer.roles
    assert not roles.leaves_thought_open(adapter._pair(context, "x").ids[:-1])
    for each in (adapter, plain):
        each.close()


@pytest.mark.parametrize(
    ("given", "words"),
    [({"num_beams": 4}, "no beam search"), ({"typical_p": 0.5}, "typical_p: is not implemented")],
)
def test_what_would_change_an_answer_is_refused(
    adapter: ApertusLM, given: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        adapter.generate_until([request("generate_until", "Hello", {"until": ["\n"], **given})])


def test_lm_eval_itself_is_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It prints and draws a bar where it estimates the error of what is no mean, and runs git."""
    monkeypatch.chdir(tmp_path)
    values = [0.0, 1.0, 1.0]
    drawn = vars(tqdm)["__init__"]
    with quiet():
        found = bootstrap_stderr(mean, values, iters=1000)
        evaluator.get_git_commit_hash()
    assert found > 0
    assert capfd.readouterr() == ("", "")
    assert evaluator.get_git_commit_hash is get_git_commit_hash
    assert vars(tqdm)["__init__"] is drawn
    assert "DISABLE_MULTIPROC" not in os.environ


def test_repeats_are_drawn_anew_and_the_same_again(tmp_path: Path) -> None:
    given = {"do_sample": True, "temperature": 1.5, "max_gen_toks": 12}
    asked = [request("generate_until", "Hello", given) for _ in range(3)]
    adapter = ApertusLM(answers=tmp_path / "kept.jsonl")
    first = adapter.generate_until(asked)
    again = adapter.generate_until(asked[:2])
    adapter.close()
    assert len(set(first)) > 1 and again == first[:2]


@pytest.mark.nightly
def test_the_offline_task_and_going_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Scores are those of likelihoods by the API; a second run computes what is missing alone."""
    out = tmp_path / "scores.json"
    arguments = ["eval", str(model_dir()), "--tasks", "plain_facts_de", "--out", str(out)]
    app([*arguments, "--offline", "--json"], standalone_mode=False)
    said = capsys.readouterr()
    printed = json.loads(said.out)
    assert "it/s" not in said.err
    assert json.loads(out.read_text("utf-8")) == printed
    scores = {each["metric"]: each for each in printed["models"]["model"]["scores"]}
    data = json.loads(Path(likelihood.__file__).with_name("plain_facts.json").read_text("utf-8"))
    right = 0
    with load() as model:
        for item in data["languages"]["de"]["items"]:
            start = f"Frage: {item['question']}\nAntwort:"
            before = len(model.encode(start))
            found = [sum(model.logprobs(f"{start} {each}")[before:]) for each in item["choices"]]
            right += found.index(max(found)) == item["answer"]
    assert scores["acc"]["value"] == pytest.approx(right / 10)
    assert scores["acc"]["questions"] == 10

    def never(*_: Any) -> Any:
        raise AssertionError("computed again")

    monkeypatch.setattr("apertus_mlx.measure.tasks.peer.likelihoods", never)
    kept = out.with_name("scores.answers.jsonl")
    lines = kept.read_text("utf-8").splitlines(keepends=True)
    assert len(lines) == 40
    again = evaluate_tasks(model_dir(), "plain_facts_de", out=out, offline=True)
    assert again.as_json() == printed
    kept.write_text("".join(lines[1:]), "utf-8")
    with pytest.raises(AssertionError, match="computed again"):
        evaluate_tasks(model_dir(), "plain_facts_de", out=out, offline=True)


@pytest.mark.nightly
def test_a_data_set_that_cannot_be_had() -> None:
    """lm-eval reads the names of all its tasks, which takes it a while."""
    words = "--tasks hellaswag, winogrande: cannot be loaded: .*; leave out --offline to download"
    with pytest.raises(NotFoundError, match=words):
        evaluate_tasks(model_dir(), ["hellaswag", "plain_facts", "winogrande"], offline=True)


@pytest.mark.nightly
def test_lm_evals_own_command_knows_the_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import runpy

    task = {
        "task": "own", "dataset_path": "json", "output_type": "multiple_choice",
        "dataset_kwargs": {"data_files": str(tmp_path / "items.jsonl")}, "test_split": "train",
        "doc_to_text": "{{prompt}}", "doc_to_choice": "choices", "doc_to_target": "answer",
    }  # fmt: skip
    item = {"prompt": "2 + 2 =", "choices": ["4", "5"], "answer": 0}
    (tmp_path / "items.jsonl").write_text(json.dumps(item) + "\n")
    (tmp_path / "own.yaml").write_text(json.dumps(task))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    command = ["run", "--model", "apertus_mlx", "--tasks", "own", "--include_path", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["lm_eval", *command, "--output_path", str(tmp_path / "out")])
    runpy.run_module("apertus_mlx.measure.tasks", run_name="__main__")
    [found] = (tmp_path / "out").rglob("results*.json")
    assert json.loads(found.read_text())["n-samples"]["own"]["effective"] == 1
