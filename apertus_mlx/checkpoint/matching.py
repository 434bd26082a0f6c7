"""Matches the tensors of a checkpoint with the parts of a model: names, shapes and types."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TypeVar

from apertus_mlx.checkpoint import layout
from apertus_mlx.checkpoint.config import ModelConfig
from apertus_mlx.checkpoint.header import TensorInfo
from apertus_mlx.checkpoint.quantization_block import AT_LOADING
from apertus_mlx.errors import RejectedError

FLOAT_DTYPES = ("BF16", "F16", "F32")
# Values of the xIELU constants that some exporters leave out.
XIELU_DEFAULTS = {"beta": 0.5, "eps": -1e-6}
# Buffers that Hugging Face models may carry and that are derived from the config.
IGNORED_SUFFIX = "rotary_emb.inv_freq"
MAX_NAMES_SHOWN = 10

T = TypeVar("T")


def without_left_over(config: ModelConfig, tensors: Mapping[str, TensorInfo]) -> ModelConfig:
    """The config without a block that only says how weights are to be loaded.

    A model that was loaded compressed, then merged and saved in 16 bits, may still carry it.
    """
    if config.foreign_quantization is None or config.foreign_quantization[0] not in AT_LOADING:
        return config
    if any(tensor.dtype not in FLOAT_DTYPES for tensor in tensors.values()):
        return config
    return replace(config, foreign_quantization=None)


class Unmatched:
    """The tensors of a checkpoint that no part of the model has taken yet.

    Attributes:
        name: what error messages call the checkpoint.
        dropped: tensor name -> why it has no place in the model.
    """

    def __init__(self, tensors: Mapping[str, TensorInfo], name: str, prefix: str = "") -> None:
        """`prefix`: where the text model's names begin with it, it is replaced by `model.`."""
        self.name = name
        self.dropped: dict[str, str] = {}
        self._left: dict[str, TensorInfo] = {}
        for key, tensor in tensors.items():
            inner = prefix and key.startswith(prefix)
            self._left["model." + key.removeprefix(prefix) if inner else key] = tensor

    def __contains__(self, key: str) -> bool:
        return key in self._left

    def take(self, key: str) -> TensorInfo | None:
        """The tensor called `key`, which is then matched; None where there is none."""
        return self._left.pop(key, None)

    def peek(self, key: str) -> TensorInfo:
        """The tensor called `key`, which stays unmatched for now."""
        if key not in self._left:
            raise RejectedError(f"{self.name}: {key}: missing")
        return self._left[key]

    def need(self, key: str, dtypes: Iterable[str], shape: tuple[int, ...]) -> TensorInfo:
        """The tensor called `key`, of one of `dtypes` and of `shape`."""
        tensor = self.peek(key)
        self.check(key, tensor, dtypes, shape)
        del self._left[key]
        return tensor

    def check(
        self, key: str, tensor: TensorInfo, dtypes: Iterable[str], shape: tuple[int, ...]
    ) -> None:
        """Refuse a tensor of another type or shape; `[1]` and a scalar count as one shape."""
        same = tensor.shape == shape or (len(shape) < 2 and {tensor.shape, shape} == {(), (1,)})
        if not same:
            raise RejectedError(
                f"{self.name}: {key}: shape {list(tensor.shape)}, the config says {list(shape)}"
            )
        if tensor.dtype not in dtypes:
            raise RejectedError(
                f"{self.name}: {key}: type {tensor.dtype}, expected {' or '.join(dtypes)}"
            )

    def drop(self, key: str, reason: str) -> None:
        """Leave a tensor out of the model."""
        if self._left.pop(key, None) is not None:
            self.dropped[key] = reason

    def drop_where(self, prefixes: tuple[str, ...], reason: str) -> None:
        """Leave out all tensors whose names start so."""
        for key in [key for key in self._left if key.startswith(prefixes)]:
            self.drop(key, reason)

    def matrices(
        self, config: ModelConfig, match: Callable[[layout.Matrix], T]
    ) -> dict[layout.Matrix, T]:
        """What `match` takes for each weight matrix of the model, in the model's order."""
        matrices = list(layout.matrices(config))
        stored = {key.rpartition(".")[0] for key in self._left}
        absent = [matrix.weight for matrix in matrices if matrix.path not in stored]
        if absent:
            raise RejectedError(f"{self.name}: missing {listed(absent)}")
        return {matrix: match(matrix) for matrix in matrices}

    def vectors(self, config: ModelConfig) -> dict[str, TensorInfo | None]:
        """Norms and xIELU parameters; None for the constants that some exporters leave out."""
        shapes = dict(layout.vectors(config))
        absent = shapes.keys() - self._left.keys()
        absent_constants = {key for key in absent if key.rsplit(".", 1)[-1] in XIELU_DEFAULTS}
        if absent > absent_constants:
            raise RejectedError(f"{self.name}: missing {listed(absent - absent_constants)}")
        return {
            key: None if key in absent else self.need(key, FLOAT_DTYPES, shape)
            for key, shape in shapes.items()
        }

    def take_tied_head(self, config: ModelConfig) -> tuple[tuple[TensorInfo, TensorInfo], ...]:
        """Leave out a head that is stored although the config ties it to the embedding.

        Call it before the embedding is taken. Returns pairs of tensors, head and embedding, that
        must hold the same bytes.
        """
        if not config.tie_word_embeddings:
            return ()
        pairs = []
        for key in [key for key in self._left if key.startswith(f"{layout.HEAD}.")]:
            head = self._left[key]
            embedding = self._left.get(key.replace(layout.HEAD, layout.EMBEDDING, 1))
            if embedding is None or (embedding.dtype, embedding.shape) != (head.dtype, head.shape):
                raise RejectedError(
                    f"{self.name}: {key}: stored beside tied embeddings of another form"
                )
            pairs.append((head, embedding))
            self.drop(key, "equal to the tied embedding")
        return tuple(pairs)

    def refuse_rest(self) -> None:
        """Refuse what no part has taken, apart from buffers that follow from the config."""
        for key in [key for key in self._left if key.endswith(IGNORED_SUFFIX)]:
            self.drop(key, "derived from the config")
        if self._left:
            raise RejectedError(f"{self.name}: unexpected {listed(self._left)}")


def listed(names: Iterable[str]) -> str:
    """How many tensors and the first names, for error messages."""
    found = sorted(names)
    shown = ", ".join(name[:80] for name in found[:MAX_NAMES_SHOWN])
    more = len(found) - MAX_NAMES_SHOWN
    what = "tensor" if len(found) == 1 else f"{len(found)} tensors:"
    return f"{what} {shown}" + (f" and {more} more" if more > 0 else "")
