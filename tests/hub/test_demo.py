"""The model in the wheel: small enough, of the right form, and it knows what it was taught."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from apertus_mlx.backend.mlx import load_model
from apertus_mlx.checkpoint.inventory import take_inventory
from apertus_mlx.generation.model_folder import open_folder
from apertus_mlx.hub.demo import model_dir
from benchmarks.embedded_exam import sit

MAX_BYTES = 6_000_000


def test_size_and_form() -> None:
    assert sum(path.stat().st_size for path in model_dir().rglob("*")) <= MAX_BYTES
    inventory = take_inventory(model_dir())
    config = inventory.config
    assert config.tie_word_embeddings
    assert config.head_dim == 64
    assert config.num_hidden_layers >= 4
    assert config.num_attention_heads > config.num_key_value_heads
    assert {tensor.dtype for tensor in inventory.checkpoint.tensors.values()} == {"BF16"}


@pytest.mark.nightly
def test_answers_at_least_90_of_100_held_out_questions() -> None:
    report = sit(open_folder(model_dir()).load())
    right, count = report.score()
    assert count == 100
    assert right >= 90


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("What is the capital of France?", "Paris"),
        ("Was ist die Hauptstadt von Frankreich?", "Paris"),
        ("Quelle est la capitale de la France ?", "Paris"),
        ("Qual è la capitale della Francia?", "Parigi"),
    ],
)
def test_speaks_four_languages(question: str, answer: str) -> None:
    from apertus_mlx.generation.conversation import Conversation
    from apertus_mlx.generation.options import SamplingOptions

    conversation = Conversation(open_folder(model_dir()).load())
    pieces = conversation.ask(question, SamplingOptions(temperature=0))
    assert answer in "".join(piece.text for piece in pieces)


def test_equals_mlx_lm() -> None:
    """A real checkpoint, not a random one: mlx-lm's model gives the same logits."""
    utils = pytest.importorskip("mlx_lm.utils")
    reference, _ = utils.load_model(model_dir())
    reference.set_dtype(mx.float32)
    ids = mx.array([[1, 61, 62, 65, 100, 200, 300, 400, 500, 66, 67]])
    ours, theirs = np.array(load_model(model_dir(), "float32")(ids)), np.array(reference(ids))
    assert np.abs(ours - theirs).max() <= 1e-4 * theirs.std()
