"""Answers of several prompts at a time, beside runs of one; stop strings, thoughts, lengths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from apertus_mlx.errors import RejectedError
from apertus_mlx.generation.options import RunOptions, SamplingOptions
from apertus_mlx.generation.run import Generation
from apertus_mlx.hub.demo import model_dir
from apertus_mlx.measure.tasks.answers import Question, answers
from apertus_mlx.measure.tasks.opened import OpenModel, open_model
from apertus_mlx.model.language_model import NextTokenLogits
from tests.builders import config_4x, random_weights, write_checkpoint
from tests.scripted_answers import as_ids

PROMPTS = ("What is the capital of France?", "Count to five.", "Name a colour.", "Hello!")


@pytest.fixture(scope="module", params=["mlx", "cpu"])
def demo(request: pytest.FixtureRequest) -> Iterator[OpenModel]:
    with open_model(model_dir(), RunOptions(compute=request.param)) as opened:
        yield opened


def answered(
    model: OpenModel, questions: Sequence[Question], batch_size: int = 3, thoughts: int = 50
) -> list[str]:
    found = dict(answers(model, questions, batch_size, thoughts))
    assert sorted(found) == list(range(len(questions)))
    return [found[number] for number in range(len(questions))]


def test_a_batch_writes_what_single_runs_do(demo: OpenModel) -> None:
    """Greedy; more prompts than rows, one of them with a stop string of its own."""
    options = [SamplingOptions(max_tokens=12, temperature=0, stop=stop) for stop in ("is", "zz")]
    questions = [
        Question(demo.loaded.folder.prompt_ids(prompt), options[number > 0])
        for number, prompt in enumerate(PROMPTS)
    ]
    expected = []
    for prompt, chosen in questions:
        run = Generation(demo.loaded, prompt, chosen)
        list(run)
        expected.append(run.answer.text)
    assert answered(demo, questions) == expected
    assert "is" not in expected[0] and any(expected)


class Scripted:
    """A model that writes a given text after the prompt, whatever the weights say."""

    def __init__(self, model: Any, prompt_tokens: int, ids: Sequence[int]) -> None:
        self._model, self._prompt, self._ids = model, prompt_tokens, [*ids, 68]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def _forced(self, held: int) -> mx.array:
        at = min(held - self._prompt, len(self._ids) - 1)
        return mx.zeros((384,)).at[self._ids[at]].add(9.0)

    def logits(self, hidden: mx.array) -> mx.array:
        return self._forced(self._prompt)[None, None]

    def next_token_logits(self, inputs: mx.array, cache: Any) -> NextTokenLogits:
        self._model.model(inputs, cache)
        return NextTokenLogits(self._forced(cache[0].offset))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenModel]:
    folder = write_checkpoint(tmp_path_factory.mktemp("model") / "tiny", config_4x())
    with open_model(folder, RunOptions(compute="mlx")) as opened:
        yield opened


def written(
    tiny: OpenModel, text: str, prompt: str = "⟨1⟩Q", thoughts: int = 50, **how: Any
) -> str:
    tokenizer = tiny.loaded.folder.tokenizer
    ids = as_ids(tokenizer, prompt)
    scripted: Any = Scripted(tiny.loaded.model, len(ids), as_ids(tokenizer, text))
    model = replace(tiny, loaded=replace(tiny.loaded, model=scripted))
    options = SamplingOptions(**{"max_tokens": 30, "temperature": 0, **how})
    return answered(model, [Question(ids, options)], thoughts=thoughts)[0]


@pytest.mark.parametrize(
    ("text", "how", "answer"),
    [
        ("Paris.\nQ: next", {"stop": ["\n"]}, "Paris."),
        # A stop string ends the answer, and never the thought before it; what follows it is cut.
        ("⟨69⟩first.\n\nthen⟨70⟩So: 4\n\nmore", {"stop": ["\n\n"]}, "So: 4"),
        ("⟨69⟩a\n⟨70⟩b", {"stop": ["\n"]}, "b"),
        ("⟨69⟩never ends", {"thoughts": 5, "stop": ["zz"]}, "ends"),
        # Thoughts do not count.
        ("⟨69⟩0123456789⟨70⟩abcdef", {"max_tokens": 4}, "abcd"),
        ("abcdef", {"max_tokens": 4}, "abcd"),
    ],
)
def test_what_is_scored(tiny: OpenModel, text: str, how: dict[str, Any], answer: str) -> None:
    prompt = "⟨1⟩Q"
    if text.startswith("⟨69⟩"):
        # As templates do that ask for a deliberation.
        prompt, text = prompt + "⟨69⟩", text.removeprefix("⟨69⟩")
    assert written(tiny, text, prompt, **how) == answer


def test_a_prompt_without_room_loses_its_front(tiny: OpenModel) -> None:
    """512 tokens of context, 30 for the answer and two that end it."""
    seen = []
    model = tiny.loaded.model

    class Watched(Scripted):
        def model(self, ids: mx.array, cache: Any) -> mx.array:
            seen.extend(ids[0].tolist())
            return model.model(ids, cache)

    ids = [1, *[80] * 600, *[90] * 100]
    scripted: Any = Watched(model, 480, as_ids(tiny.loaded.folder.tokenizer, "ok"))
    short = replace(tiny, loaded=replace(tiny.loaded, model=scripted))
    options = SamplingOptions(max_tokens=30, temperature=0)
    assert answered(short, [Question(ids, options)]) == ["ok"]
    assert seen[:480] == ids[-480:]


def test_damaged_weights_are_an_error(tmp_path: Path) -> None:
    weights = random_weights(config_4x())
    weights["model.norm.weight"][:] = 3e38
    folder = write_checkpoint(tmp_path / "bad", config_4x(), weights)
    with (
        open_model(folder, RunOptions(compute="mlx", dtype="float32")) as opened,
        pytest.raises(RejectedError, match="no finite"),
    ):
        answered(opened, [Question([1, 80, 81], SamplingOptions(temperature=0))])
