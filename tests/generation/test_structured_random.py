"""Answers of models that know nothing, to random schemas: as the jsonschema package has them."""

from __future__ import annotations

import random
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import mlx.core as mx
import numpy as np
import pytest

from apertus_mlx.cache import Cache
from apertus_mlx.checkpoint.config import ModelConfig
from apertus_mlx.errors import UsageError
from apertus_mlx.generation.model_folder import LoadedModel, ModelFolder, open_folder
from apertus_mlx.generation.options import RunOptions, SamplingOptions
from apertus_mlx.generation.run import Generation
from apertus_mlx.hub.demo import model_dir
from apertus_mlx.model.language_model import LanguageModel, NextTokenLogits
from apertus_mlx.text.roles import Role
from apertus_mlx.text.template import Message
from tests.builders import config_4x, write_checkpoint
from tests.random_schemas import SchemaMaker, faults

SAMPLERS: tuple[dict[str, Any], ...] = (
    {"temperature": 0},
    {"temperature": 1.0, "top_p": 1.0},
    {"temperature": 2.0, "top_p": 1.0},
    {"temperature": 1.0, "top_k": 5},
    {"temperature": 1.5, "top_p": 0.5},
    {"temperature": 1.0, "top_p": 1.0, "min_p": 0.2},
    {"temperature": 0.0, "repetition_penalty": 1.5},
    {"temperature": 1.0, "presence_penalty": 2.0, "frequency_penalty": 2.0},
    {"temperature": 1.0, "top_p": 1.0, "logit_bias": {70: 100, 71: 100, 90: -100}},
)


@dataclass
class Count:
    """What became of the schemas."""

    answers: int = 0
    cut: int = 0
    refused: int = 0
    thoughts: int = 0

    def __add__(self, other: Count) -> Count:
        return Count(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __str__(self) -> str:
        return (
            f"{self.answers} answers, {self.cut} cut, {self.thoughts} after thoughts; "
            f"{self.refused} schemas refused"
        )


class RandomLogits:
    """A language model whose logits are random numbers."""

    layers = ()
    on_gpu = False
    arithmetic = "random"

    def __init__(self, config: ModelConfig, spread: float) -> None:
        self.config = config
        self._random = np.random.default_rng(0)
        self._spread = spread

    def model(self, ids: mx.array, cache: object = None) -> mx.array:
        return mx.zeros((1, ids.shape[1], 1))

    def logits(self, hidden: mx.array) -> mx.array:
        return self.next_token_logits().values[None, None]

    def next_token_logits(self, *_: object) -> NextTokenLogits:
        drawn = self._random.standard_normal(self.config.output_vocab_size, np.float32)
        return NextTokenLogits(mx.array(drawn * self._spread))

    def make_cache(self, form: object = None) -> list[Cache]:
        return []


def tiny(folder: Path) -> ModelFolder:
    config = config_4x(
        num_hidden_layers=1, hidden_size=32, intermediate_size=32, max_position_embeddings=4096
    )
    return open_folder(write_checkpoint(folder, config))


def random_logits(folder: ModelFolder, spread: float) -> LoadedModel:
    return LoadedModel(folder, cast(LanguageModel, RandomLogits(folder.config, spread)))


def answer_schemas(loaded: LoadedModel, wanted: int, seed: int, most: int = 1500) -> Count:
    """Let a model answer `wanted` schemas, by each sampler in turn."""
    maker, count, choose = SchemaMaker(seed), Count(), random.Random(seed)
    template = loaded.folder.template
    assert template is not None
    prompt = template.render([Message(role="user", content="Answer in JSON.")])
    while count.answers < wanted:
        schema = maker.make()
        sampler = SAMPLERS[count.answers % len(SAMPLERS)]
        think = choose.random() < 0.3
        try:
            options = SamplingOptions(
                **sampler, schema=schema, seed=seed, max_tokens=most, max_thought_tokens=9
            )
        except UsageError:
            count.refused += 1
            continue
        open_thought = [Role.INNER.start] if think and choose.random() < 0.5 else []
        run = Generation(loaded, [*prompt, *open_thought], options, think=think)
        pieces = list(run)
        answer = run.answer
        count.answers += 1
        count.thoughts += any(piece.is_thought for piece in pieces)
        if answer.finish_reason == "length":
            assert len(answer.token_ids) == most
            count.cut += 1
            continue
        assert answer.finish_reason == "stop"
        assert not faults(schema, answer.text), (schema, answer.text)
    return count


def test_answers_of_random_logits(tmp_path: Path) -> None:
    count = answer_schemas(random_logits(open_folder(model_dir()), 1), 7, 1, 150)
    count += answer_schemas(random_logits(tiny(tmp_path), 3), 7, 2, 150)
    print(count)
    assert count.cut <= 5 and count.refused < 6 and count.thoughts


@pytest.mark.parametrize("compute", ["mlx", "cpu"])
def test_answers_of_models(compute: Literal["mlx", "cpu"], tmp_path: Path) -> None:
    count = answer_schemas(tiny(tmp_path).load(RunOptions(compute=compute)), 2, 3, 80)
    assert count.answers == 2


@pytest.mark.nightly
def test_answers_to_1000_schemas(tmp_path: Path) -> None:
    embedded, random_model = open_folder(model_dir()), tiny(tmp_path)
    parts: list[tuple[str, LoadedModel, int, int]] = [
        ("random logits, embedded vocabulary", random_logits(embedded, 1), 400, 1500),
        ("random logits, vocabulary of bytes", random_logits(random_model, 3), 400, 1500),
        ("embedded model", embedded.load(), 100, 300),
        ("random model, mlx", random_model.load(RunOptions(compute="mlx")), 50, 300),
        ("random model, cpu", random_model.load(RunOptions(compute="cpu")), 50, 300),
    ]
    total = Count()
    for seed, (name, loaded, wanted, most) in enumerate(parts):
        count = answer_schemas(loaded, wanted, seed, most)
        print(f"{name}: {count}", flush=True)
        total += count
    print(f"all: {total}")
    assert total.cut < total.answers / 10 and total.refused < total.answers / 4
