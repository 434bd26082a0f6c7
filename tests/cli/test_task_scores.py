"""`eval --tasks` and `--languages`: what is refused before any work, and what is shown."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from apertus_mlx import evaluate_tasks
from apertus_mlx.cli.app import app
from apertus_mlx.cli.task_scores import draw_scores, score_table
from apertus_mlx.errors import UsageError
from apertus_mlx.measure.tasks.run import ModelScores, Score


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "--reference: give the model that the others were made from, or --tasks"),
        (("--reference", "x", "--limit", "5"), "are for --tasks"),
        (("--reference", "x", "--out", "y.json"), "are for --tasks"),
        (("--tasks", "plain_facts", "--reference", "x"), "leave out --reference"),
        (("--tasks", "plain_facts", "--languages"), "leave out --reference and texts"),
        (("--tasks", "plain_facts", "--tokens", "64"), "--tokens: is for texts; --limit bounds"),
        (("--tasks", "plain_facts", "--think"), "give --chat, too"),
        (("--tasks", "plain_facts", "--out", "nowhere/y.json"), "its folder does not exist"),
    ],
)
def test_wrong_usage(options: tuple[str, ...], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        app(["eval", "model", *options], standalone_mode=False)


def test_without_lm_eval_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(UsageError, match="--tasks: needs lm-eval: pip install lm-eval"):
        evaluate_tasks("model", "plain_facts")


MODELS = {
    "whole": ModelScores(
        2_000_000, (Score("t", "acc", 0.5, 0.1, 26), Score("t", "f1", 0.3, None, 26))
    ),
    "4bit": ModelScores(600_000, (Score("t", "acc", 0.25, None, 26),)),
}


def test_models_stand_side_by_side() -> None:
    lines = [line.split() for line in score_table(MODELS).lines()]
    # 13 of 26: Wilson's interval is 0.5 ± 0.1795.
    assert lines[1:] == [
        ["t", "whole", "2.0", "MB", "26", "acc", "0.5000", "0.321", "to", "0.679"],
        ["t", "4bit", "600.0", "kB", "26", "acc", "0.2500", "-"],
        ["t", "whole", "2.0", "MB", "26", "f1", "0.3000", "-"],
    ]


def test_a_plot_has_a_line_for_each_task(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "tasks.svg"
    draw_scores(MODELS, path)
    assert "<!-- t, acc -->" in path.read_text("utf-8")
