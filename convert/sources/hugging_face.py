"""Unquantized checkpoints as transformers writes them, and the text part of Apertus 1.5."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from apertus_mlx.checkpoint import layout
from apertus_mlx.checkpoint.config import ModelConfig
from apertus_mlx.checkpoint.header import TensorInfo
from apertus_mlx.checkpoint.inventory import FLOAT_DTYPES
from apertus_mlx.convert.sources.source import PlainMatrix, Source, Tensors, listed
from apertus_mlx.errors import RejectedError

TEXT_PREFIX = "model.language_model."
OTHER_PARTS = ("model.vision_tokenizer.", "model.audio_tokenizer.")


def open_tensors(config: ModelConfig, tensors: Mapping[str, TensorInfo], name: str) -> Tensors:
    """The tensors under the names of an Apertus text model."""
    if config.family == "apertus":
        return Tensors(tensors, name)
    prefix = TEXT_PREFIX if any(key.startswith(TEXT_PREFIX) for key in tensors) else ""
    found = Tensors(tensors, name, prefix)
    found.drop_where(OTHER_PARTS, "not part of the text model")
    return found


def source(
    config: ModelConfig,
    tensors: Mapping[str, TensorInfo],
    name: str,
    untied_head: bool = False,
) -> Source:
    """Recognise an unquantized checkpoint.

    Args:
        config: what `config.json` says.
        tensors: the inventory, by source name.
        name: what error messages call the checkpoint.
        untied_head: keep a stored head although the config ties it to the embedding.
    """
    left = open_tensors(config, tensors, name)
    target = replace(config, family="apertus")
    tied_pair = None
    if config.tie_word_embeddings:
        if untied_head and layout.HEAD + ".weight" in left:
            target = replace(target, tie_word_embeddings=False)
        else:
            tied_pair = left.take_tied_head()
    missing = [m.weight for m in layout.matrices(target) if m.weight not in left]
    if missing:
        raise RejectedError(f"{name}: missing {listed(missing)}")
    matrices = {
        matrix.path: PlainMatrix(
            left.need(matrix.weight, FLOAT_DTYPES, (matrix.rows, matrix.columns))
        )
        for matrix in layout.matrices(target)
    }
    vectors = left.vectors(target)
    left.refuse_left()
    kind = "Hugging Face" if config.family == "apertus" else "Apertus 1.5, text part"
    return Source(kind, name, target, matrices, vectors, left.dropped, (), tied_pair)
