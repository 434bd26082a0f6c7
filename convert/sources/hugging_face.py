"""Unquantized checkpoints as transformers writes them, and the text part of Apertus 1.5."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from apertus_mlx.checkpoint import layout
from apertus_mlx.checkpoint.config import ModelConfig
from apertus_mlx.checkpoint.header import TensorInfo
from apertus_mlx.checkpoint.matching import FLOAT_DTYPES, Unmatched
from apertus_mlx.convert.sources.source import PlainMatrix, Source, match_source

TEXT_PREFIX = "model.language_model."
OTHER_PARTS = ("model.vision_tokenizer.", "model.audio_tokenizer.")


def open_tensors(config: ModelConfig, tensors: Mapping[str, TensorInfo], name: str) -> Unmatched:
    """The tensors under the names of an Apertus text model."""
    if config.family == "apertus":
        return Unmatched(tensors, name)
    prefix = TEXT_PREFIX if any(key.startswith(TEXT_PREFIX) for key in tensors) else ""
    found = Unmatched(tensors, name, prefix)
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
        tensors: the stored tensors by name.
        name: what error messages call the checkpoint.
        untied_head: keep a stored head although the config ties it to the embedding.
    """
    left = open_tensors(config, tensors, name)
    target = replace(config, family="apertus")
    if untied_head and f"{layout.HEAD}.weight" in left:
        target = replace(target, tie_word_embeddings=False)
    kind = "Hugging Face" if config.family == "apertus" else "Apertus 1.5, text part"
    return match_source(kind, target, left, lambda matrix: plain_matrix(matrix, left))


def plain_matrix(matrix: layout.Matrix, left: Unmatched) -> PlainMatrix:
    """A matrix that is stored as floats."""
    return PlainMatrix(left.need(matrix.weight, FLOAT_DTYPES, (matrix.rows, matrix.columns)))
