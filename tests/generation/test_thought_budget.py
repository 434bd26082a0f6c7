"""How long a deliberation may be: counted by hand, on both computes and as decoding runs ahead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from apertus_mlx.generation.decode import draw_tokens
from apertus_mlx.generation.model_folder import open_folder
from apertus_mlx.generation.options import RunOptions, SamplingOptions
from apertus_mlx.generation.run import Generation
from apertus_mlx.generation.sampling import Sampler, SamplingParams
from apertus_mlx.generation.thought_budget import ThoughtBudget
from apertus_mlx.model.language_model import NextTokenLogits
from tests.builders import config_4x, write_checkpoint

PAIRS = [(32, 33), (69, 70)]


def drawn(wanted: list[int], most: int, opened: int | None = None) -> list[int]:
    """What becomes of the tokens that a model wants."""
    rows = iter(np.eye(100, dtype=np.float32)[wanted])
    budget = ThoughtBudget(most, PAIRS, 71, opened)
    sampler = Sampler(SamplingParams(temperature=0), [], 100, budget)

    def step(_: mx.array) -> NextTokenLogits:
        return NextTokenLogits(mx.array(next(rows)))

    first = mx.array(next(rows))
    return list(draw_tokens(step, first, sampler, len(wanted)))


@pytest.mark.parametrize(
    ("wanted", "most", "expected"),
    [
        ([80, 69, 81, 82, 83, 84, 85], 2, [80, 69, 81, 82, 70, 84, 85]),
        ([69, 81, 82, 83], 0, [69, 70, 82, 83]),
        ([69, 81, 70, 83, 84, 85, 86], 2, [69, 81, 70, 83, 84, 85, 86]),
        ([69, 81, 82, 70, 84, 85, 86], 2, [69, 81, 82, 70, 84, 85, 86]),
        ([32, 81, 82, 83], 1, [32, 81, 33, 83]),
        # A second deliberation has a budget of its own.
        ([69, 81, 82, 83, 69, 84, 85], 1, [69, 81, 70, 83, 69, 84, 70]),
        # A tool call within a deliberation is none, and must stay whole.
        ([69, 81, 71, 90, 91, 92, 93], 2, [69, 81, 71, 90, 91, 92, 93]),
    ],
)
def test_tokens(wanted: list[int], most: int, expected: list[int]) -> None:
    assert drawn(wanted, most) == expected


def test_a_deliberation_that_the_prompt_opened() -> None:
    assert drawn([80, 81, 82, 83], 2, opened=69) == [80, 81, 70, 83]
    assert drawn([80, 81, 82, 83], 2, opened=32) == [80, 81, 33, 83]


@pytest.mark.parametrize("compute", ["mlx", "cpu"])
@pytest.mark.parametrize("penalty", [None, 1.5])
def test_in_a_run(compute: Any, penalty: float | None, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, config_4x(num_hidden_layers=1))
    loaded = open_folder(folder).load(RunOptions(compute=compute))
    options = SamplingOptions(
        max_tokens=9, temperature=1.0, seed=2, max_thought_tokens=4, logit_bias={100: 90},
        presence_penalty=penalty,
    )  # fmt: skip
    run = Generation(loaded, [1, 67, 69], options)
    list(run)
    assert run.answer.token_ids == [100] * 4 + [70] + [100] * 4
    text = loaded.folder.tokenizer.decode([100])
    assert (run.answer.thought, run.answer.text) == (text * 4, text * 4)
