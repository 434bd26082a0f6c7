"""Text that a model writes itself, to learn from beside other text.

Each window begins with a few tokens of a text and goes on with tokens that are drawn from the
model's own predictions, as in "LLM-QAT: Data-Free Quantization Aware Training for Large Language
Models" (arXiv 2305.17888).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from apertus_mlx.checkpoint import layout
from apertus_mlx.convert.evaluation.layerwise import Weights, head_path
from apertus_mlx.convert.evaluation.products import product
from apertus_mlx.convert.evaluation.texts import Tokens
from apertus_mlx.convert.plan.writing_memory import TOGETHER
from apertus_mlx.convert.write.keep import Keep
from apertus_mlx.model.apertus import Model
from apertus_mlx.quant.arrays import blocks

# Tokens of the text that a window begins with.
BEGINNING = 8
SEED = 0


def own_text(
    weights: Weights, text: Tokens, count: int, file: Path, progress: Callable[[int], None]
) -> Tokens:
    """`count` windows that a model writes; see `Writer.windows`.

    They are kept in `file`: for whoever asks again, and for a run that goes on.
    """
    keep, written = Keep(file), text[:0]
    if (kept := keep.load()) is not None:
        written = kept[1]["windows"]
    if len(written) < count:
        for more in Writer(weights).windows(text, count, SEED, progress, written):
            written = more
            keep.reach({}, {"windows": written})
        keep.save({}, {"windows": written})
    return written


class _Product(nn.Module):
    """A projection whose product is computed by whatever is quickest here."""

    def __init__(self, weight: mx.array) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.weight = weight

    def __call__(self, x: mx.array) -> mx.array:
        return product(x, self.weight)


class Writer:
    """A model that writes, in float32 and in memory as a whole."""

    def __init__(self, weights: Weights) -> None:
        config = weights.config
        self._model = Model(config)
        matrices = {
            each.path: mx.array(weights.matrix(each.path)) for each in layout.matrices(config)
        }
        embedding = matrices.pop(layout.EMBEDDING)
        self._head = embedding if config.tie_word_embeddings else matrices[head_path(config)]
        modules = {path: _Product(weight) for path, weight in matrices.items()}
        self._model.update_modules(tree_unflatten(list(modules.items())))
        arrays = {
            name: mx.array(weights.vector(name)).reshape(shape)
            for name, shape in layout.vectors(config)
        }
        arrays[f"{layout.EMBEDDING}.weight"] = embedding
        self._model.update(tree_unflatten(list(arrays.items())))

    def windows(
        self, text: Tokens, count: int, seed: int, progress: Callable[[int], None], written: Tokens
    ) -> Iterator[Tokens]:
        """`count` windows as long as those of `text` `[windows, length]`, drawn at temperature 1.

        Yields all that there are, each time that some more have been written.

        Args:
            text: where windows begin: somewhere in it.
            count: how many.
            seed: of the beginnings and of the draws.
            progress: told the tokens that are written.
            written: windows that an earlier run with the same arguments has left.
        """
        length = text.shape[1]
        begun = min(BEGINNING, length - 1)
        chance = np.random.default_rng(seed)
        windows = chance.integers(len(text), size=count)
        places = chance.integers(length - begun + 1, size=count)
        beginnings = text[windows[:, None], places[:, None] + np.arange(begun)]
        for part in blocks(count, TOGETHER):
            if part.stop <= len(written):
                continue
            # Each part has keys of its own, so that a run which goes on draws the same.
            key = mx.random.key(seed + part.start)
            parts, cache = [mx.array(beginnings[part])], self._model.make_cache()
            while len(parts) <= length - begun:
                hidden = self._model.model(parts[-1], cache)[:, -1]
                key, own = mx.random.split(key)
                drawn = mx.random.categorical(product(hidden, self._head), key=own)
                mx.eval(drawn)
                parts.append(drawn[:, None])
                progress(part.start * length + len(drawn) * (begun + len(parts) - 1))
            found = np.array(mx.concatenate(parts, axis=1)).astype(np.int64)
            written = np.concatenate([written[: part.start], found])
            yield written
