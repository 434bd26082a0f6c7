"""A second small model to judge quantizers by, trained on the spot with MLX alone.

It differs from the embedded one where quantizers may care: its head is its own, its heads are
narrower, and it has seen little text. Text and tokenizer are those of the embedded model's recipe.

    python -m tests.trained_model FOLDER
"""

from __future__ import annotations

import fcntl
import math
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import numpy as np
import pytest
from mlx.utils import tree_flatten

from apertus_mlx.checkpoint.config import parse_config
from apertus_mlx.convert.evaluation.products import product
from apertus_mlx.hub.demo import model_dir
from apertus_mlx.model.apertus import Model
from recipes.demo.corpus import documents
from tests.builders import config_4x, write_checkpoint

CONFIG = config_4x(
    hidden_size=128,
    intermediate_size=384,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_hidden_layers=2,
    tie_word_embeddings=False,
    torch_dtype="bfloat16",
    vocab_size=1792,
)
TRAINING_SEED = 77
LENGTH = 128
BATCH_WINDOWS = 4
STEPS = 250
PEAK_RATE = 0.012
WARMUP_STEPS = 10


class Projection(nn.Module):
    """A matrix without bias; where MLX has no GPU its products are NumPy's."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.weight = mx.random.normal((rows, columns)) * columns**-0.5

    def __call__(self, x: mx.array) -> mx.array:
        return product(x, self.weight)


def trained_model(folder: Path) -> Path:
    """The model's folder inside `folder`, trained if it is not there yet; the same every time.

    Processes that ask at once wait for the first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = folder / "trained"
    with (folder / "trained.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not model.exists():
            partial = folder / "trained.partial"
            shutil.rmtree(partial, ignore_errors=True)
            _write(partial, train())
            partial.rename(model)
    return model


def session_model(factory: pytest.TempPathFactory) -> Path:
    """The model's folder, one for a whole run of pytest, however many workers it has."""
    base = factory.getbasetemp()
    return trained_model(base.parent if "PYTEST_XDIST_WORKER" in os.environ else base)


def recipe_windows(seed: int, count: int, length: int = LENGTH) -> np.ndarray:
    """Windows `[count, length]` of documents from the recipe of the embedded model."""
    stream = _stream(seed)
    ids = [next(stream) for _ in range(count * length)]
    return np.array(ids).reshape(count, length)


def train(steps: int = STEPS) -> dict[str, mx.array]:
    """Float32 weights by their Hugging Face names."""
    mx.random.seed(TRAINING_SEED)
    model = new_model()
    optimizer = optimizers.AdamW(
        lambda step: PEAK_RATE * _share(step, steps), betas=[0.9, 0.95], weight_decay=0.05,
        bias_correction=True,
    )  # fmt: skip
    gradient = nn.value_and_grad(model, _loss)
    windows = recipe_windows(TRAINING_SEED, steps * BATCH_WINDOWS)
    for step in range(steps):
        batch = mx.array(windows[step * BATCH_WINDOWS : (step + 1) * BATCH_WINDOWS])
        loss, gradients = gradient(model, batch)
        gradients, _ = optimizers.clip_grad_norm(gradients, 1.0)
        optimizer.update(model, gradients)
        mx.eval(model.parameters(), optimizer.state, loss)
    return dict(tree_flatten(model.parameters()))


def new_model() -> Model:
    """Random weights: normal, each matrix scaled to keep the size of what it is given."""
    config = parse_config(CONFIG)
    model = Model(config)
    use_quick_products(model)
    model.model.embed_tokens.weight = mx.random.normal((config.vocab_size, config.hidden_size))
    return model


def use_quick_products(model: Model) -> None:
    """Give `model` matrices that learn quickly where MLX has no GPU; their values are new."""
    modules: list[tuple[str, Any]] = list(model.named_modules())
    for _, module in modules:
        for name, child in list(module.items()):
            if isinstance(child, nn.Linear):
                setattr(module, name, Projection(*child.weight.shape))


def _loss(model: Model, batch: mx.array) -> mx.array:
    logits = model(batch[:, :-1])
    return nn.losses.cross_entropy(logits, batch[:, 1:], reduction="mean")


def _share(step: mx.array, steps: int) -> mx.array:
    """Of the peak rate: up to it in a few steps, then a cosine down to nothing."""
    down = 0.5 * (1 + mx.cos(math.pi * step / steps))
    return mx.minimum((step + 1) / WARMUP_STEPS, down)


def _stream(seed: int) -> Iterator[int]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model_dir() / "tokenizer.json"))
    for document in documents(seed):
        for segment in document:
            yield from tokenizer.encode(segment.text, add_special_tokens=False).ids


def _write(folder: Path, weights: dict[str, mx.array]) -> None:
    write_checkpoint(folder, CONFIG, weights, dtype=mx.bfloat16, tokenizer=False)
    for path in model_dir().iterdir():
        if path.suffix in (".json", ".jinja") and path.name != "config.json":
            shutil.copyfile(path, folder / path.name)


if __name__ == "__main__":
    print(trained_model(Path(sys.argv[1])))
