"""A checkpoint as the planner sees it: config, formats and sizes, from headers alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from apertus_mlx.checkpoint import layout
from apertus_mlx.checkpoint.config import CONFIG_FILE, ModelConfig, parse_config
from apertus_mlx.checkpoint.header import DTYPE_BITS, TensorInfo, parse_header
from apertus_mlx.checkpoint.inventory import (
    FLOAT_DTYPES,
    Inventory,
    expected_tensors,
    take_inventory,
)
from apertus_mlx.checkpoint.tensors import INDEX_FILE, merge_headers, read_weight_map
from apertus_mlx.errors import RejectedError
from apertus_mlx.quant.spec import QuantSpec
from apertus_mlx.system.strict_json import parse_object

# Of the released sizes; of a remote model nobody asks.
RELEASED_TOKENIZER_BYTES = 17_078_480
TOKENIZER_FILE = "tokenizer.json"


@dataclass(frozen=True, slots=True)
class Subject:
    """What a plan is about.

    Attributes:
        name: how the user called it.
        file_bytes: size of all weight files together.
        stored_dtypes: the float types in which matrices that are not quantized are stored.
        tokenizer_bytes: size of the tokenizer's file.
    """

    name: str
    config: ModelConfig
    specs: Mapping[str, QuantSpec]
    file_bytes: int
    stored_dtypes: frozenset[str]
    tokenizer_bytes: int = RELEASED_TOKENIZER_BYTES

    @property
    def stored_16_bit(self) -> bool:
        """Whether the weights are such that a GPU computes in bfloat16."""
        return self.stored_dtypes <= {"BF16"}

    def weights_bytes(self, compute_bytes: int) -> int:
        """Bytes of all weights in memory, where floats take `compute_bytes` each."""
        return sum(
            _elements(shape) * _stored_bytes(dtypes, compute_bytes)
            for _, (dtypes, shape) in expected_tensors(self.config, dict(self.specs))
        )

    def read_per_token_bytes(self, compute_bytes: int) -> int:
        """Bytes of weights that one decoding step reads: all but an untied embedding."""
        read = self.weights_bytes(compute_bytes)
        if self.config.tie_word_embeddings:
            return read
        return read - sum(
            _elements(shape) * _stored_bytes(dtypes, compute_bytes)
            for key, (dtypes, shape) in expected_tensors(self.config, dict(self.specs))
            if key.startswith(f"{layout.EMBEDDING}.")
        )


def local_subject(directory: Path, name: str | None = None) -> Subject:
    """The checkpoint in `directory`.

    Raises:
        NotFoundError, RejectedError: see `take_inventory`.
    """
    return inventory_subject(take_inventory(directory), name or str(directory))


def inventory_subject(inventory: Inventory, name: str) -> Subject:
    """What `take_inventory` found."""
    checkpoint = inventory.checkpoint
    file_bytes = sum((checkpoint.directory / file).stat().st_size for file in checkpoint.files)
    kept = {
        key: tensor for key, tensor in checkpoint.tensors.items() if key not in inventory.dropped
    }
    tokenizer = checkpoint.directory / TOKENIZER_FILE
    return Subject(
        name,
        inventory.config,
        inventory.specs,
        file_bytes,
        _stored_dtypes(kept),
        tokenizer.stat().st_size if tokenizer.is_file() else 0,
    )


def remote_subject(
    name: str, files: Mapping[str, bytes], headers: Mapping[str, tuple[bytes, int]]
) -> Subject:
    """A checkpoint of which only JSON files and safetensors headers are at hand.

    Args:
        name: what error messages call it.
        files: contents of `config.json` and, if there is one, of the index.
        headers: for each weight file its raw header and the file's size.

    Raises:
        RejectedError: no config, or a config or header that is damaged or unsupported.
    """
    if CONFIG_FILE not in files:
        raise RejectedError(f"{name}: no {CONFIG_FILE}; not a model repository")
    config = parse_config(
        parse_object(files[CONFIG_FILE], f"{name}: {CONFIG_FILE}"), f"{name}: {CONFIG_FILE}"
    )
    if config.foreign_quantization is not None or config.family != "apertus":
        raise RejectedError(
            f"{name}: this format has to be converted first, so there is no plan for it yet: "
            "apertus-mlx convert"
        )
    weight_map = None
    if INDEX_FILE in files:
        index = f"{name}: {INDEX_FILE}"
        weight_map = read_weight_map(parse_object(files[INDEX_FILE], index), index)
        headers = {file: headers[file] for file in headers if file in weight_map.values()}
    parsed = {
        file: parse_header(raw, size, file, f"{name}: {file}")
        for file, (raw, size) in headers.items()
    }
    tensors = merge_headers(parsed, weight_map, name)
    specs = {}
    for matrix in layout.matrices(config):
        if matrix.weight not in tensors:
            raise RejectedError(f"{name}: missing {matrix.weight}")
        if f"{matrix.path}.scales" in tensors:
            spec = config.quantization.spec_for(matrix.path) if config.quantization else None
            if spec is None:
                raise RejectedError(
                    f"{name}: {matrix.path} is quantized, the config does not say so"
                )
            specs[matrix.path] = spec
    file_bytes = sum(size for _, size in headers.values())
    return Subject(name, config, specs, file_bytes, _stored_dtypes(tensors))


def _stored_dtypes(tensors: Mapping[str, TensorInfo]) -> frozenset[str]:
    return frozenset(
        tensor.dtype
        for tensor in tensors.values()
        if tensor.dtype in FLOAT_DTYPES and len(tensor.shape) == 2
    )


def _elements(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _stored_bytes(dtypes: tuple[str, ...], compute_bytes: int) -> int:
    return compute_bytes if dtypes == FLOAT_DTYPES else DTYPE_BITS[dtypes[0]] // 8
