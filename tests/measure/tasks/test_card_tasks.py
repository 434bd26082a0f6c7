"""Which tasks run and what is said of the others; intervals beside published ones."""

from __future__ import annotations

import pytest

from apertus_mlx.errors import UsageError
from apertus_mlx.measure.tasks.card_tasks import (
    FORK_ONLY,
    LISTS,
    NEED_A_JUDGE,
    NOWHERE,
    RUN_CODE,
    _found,
    choose,
)
from apertus_mlx.measure.tasks.own_tasks import own_tasks
from apertus_mlx.measure.tasks.run import Score, scores

KNOWN = ["hellaswag", "humaneval_instruct", "xnli", "arc_easy", "arc_multilingual"]
KNOWN += ["global_mmlu_de", "global_mmlu_fr", "global_mmlu_full_de", "global_mmlu_de_stem"]


def test_a_list_says_what_it_leaves_out() -> None:
    chosen = choose(["apertus-post", "arc_easy", "hellaswag"], KNOWN, own_tasks())
    assert chosen.tasks == ["hellaswag", "arc_multilingual", "xnli", "arc_easy"]
    said = "\n".join(chosen.notes)
    [code] = [line for line in chosen.notes if "run code" in line]
    assert "humaneval_instruct, mbpp_instruct" in code and "hellaswag" not in code
    [fork] = [line for line in chosen.notes if "Swiss fork" in line]
    assert "switzerland_qa_0shot" in fork and "swiss-ai/lm-evaluation-harness" in fork
    assert "alpaca_eval: another model has to judge" in said
    assert chosen.notes[-1].endswith("hellaswag, arc_multilingual, xnli, arc_easy")
    # Every task of the list runs, or is named.
    assert all(task in said for task in LISTS["apertus-post"])


def test_what_lm_eval_calls_otherwise() -> None:
    chosen = choose(["swissai_eval"], KNOWN, own_tasks())
    assert chosen.tasks == ["global_mmlu_de", "global_mmlu_fr", "xnli", "arc_multilingual"]
    assert "include_base_44" in chosen.notes[0]


def test_our_own_need_nothing() -> None:
    own = own_tasks()
    assert choose(["plain_facts_it"], [], own).notes == []
    # Five languages, ten questions each, the same answers.
    tasks = {name: task["custom_dataset"].args[0] for name, task in own.items()}
    assert {len(items) for items in tasks.values()} == {10, 50} and len(tasks) == 6
    answers = {tuple(item["answer"] for item in items) for items in tasks.values()}
    assert len(answers - {tuple(item["answer"] for item in tasks["plain_facts"])}) == 1
    for items in tasks.values():
        assert all(len(set(item["choices"])) == 4 for item in items)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("switzerland_qa_0shot", "the Swiss fork may have it"),
        ("hellaswagg", "but hellaswag"),
        ("apertus-pre", "none of them"),
    ],
)
def test_there_is_no_such_task(name: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        choose([name], ["hellaswag"], own_tasks())


def binary(right: int, count: int) -> Score:
    share = right / count
    return Score("t", "acc", share, (share * (1 - share) / (count - 1)) ** 0.5, count)


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [
        # Newcombe 1998 (Statistics in Medicine 17, 857), table I: the score method.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_a_share_has_wilsons_interval(right: int, count: int, low: float, high: float) -> None:
    assert binary(right, count).interval == pytest.approx((low, high), abs=1e-4)


def test_other_figures_have_the_normal_one() -> None:
    assert Score("t", "perplexity", 8.0, 0.5, 100).interval == pytest.approx((7.02, 8.98))
    assert Score("t", "acc", 0.5, None, 100).interval is None


def test_scores_of_lm_evals_result() -> None:
    found = {
        "results": {
            "a": {"alias": "a", "acc,none": 0.5, "acc_stderr,none": 0.1, "em,strict": 0.2},
            "g": {"alias": "g", "acc,none": 0.4, "acc_stderr,none": "N/A"},
        },
        "group_subtasks": {"g": ["a", "b"]},
        "n-samples": {"a": {"effective": 7}, "b": {"effective": 4}},
    }
    assert list(scores(found)) == [
        Score("a", "acc", 0.5, 0.1, 7),
        Score("a", "em (strict)", 0.2, None, 7),
        Score("g", "acc", 0.4, None, 11),
    ]


@pytest.mark.nightly
def test_names_beside_the_index_of_lm_eval() -> None:
    """Each task of the cards is there, or said to be elsewhere; and so that no more."""
    tasks = pytest.importorskip("lm_eval.tasks")
    known = set(tasks.TaskManager().all_tasks)
    elsewhere = FORK_ONLY | NEED_A_JUDGE | NOWHERE
    for name in {task for each in LISTS.values() for task in each}:
        there = choose([name], known, {}).tasks if name in known else _found(name, known)
        assert bool(there) != (name in elsewhere), name
        assert known.issuperset(there)
    assert len(_found("global_mmlu", known)) == 15
    assert len(_found("include_base_44", known)) == 44
    assert known >= RUN_CODE
