"""The tensors of a model folder by name, from the headers of its files; no arrays yet.

Nothing outside the folder is opened, apart from the blobs that a Hugging Face cache links to.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apertus_mlx.checkpoint.header import TensorInfo, read_header
from apertus_mlx.errors import NotFoundError, RejectedError
from apertus_mlx.system.model_files import exists, is_plain_name, open_file
from apertus_mlx.system.sizes import counted
from apertus_mlx.system.strict_json import read_object

COMPARE_BLOCK_BYTES = 2**22
INDEX_FILE = "model.safetensors.index.json"
_VARIANT = re.compile(r"model\.[A-Za-z0-9_-]+\.safetensors")
OTHER_FORMATS = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.gguf", "*.npz", "*.npy", "*.h5", "*.msgpack")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The tensors of a checkpoint by name, in a folder or on the Hub.

    Attributes:
        name: what error messages call it.
        files: the weight files that hold the tensors.
        folder: where these files lie; None where only their headers are known.
    """

    name: str
    files: tuple[str, ...]
    tensors: Mapping[str, TensorInfo]
    folder: Path | None

    @property
    def directory(self) -> Path:
        """The folder, of a checkpoint that has one."""
        assert self.folder is not None, f"{self.name}: only the headers are known"
        return self.folder

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.size_bytes for tensor in self.tensors.values())

    @property
    def file_bytes(self) -> int:
        """Bytes of all weight files; in each, the last tensor ends where the file ends."""
        ends = dict.fromkeys(self.files, 0)
        for tensor in self.tensors.values():
            ends[tensor.file] = max(ends[tensor.file], tensor.offset + tensor.size_bytes)
        return sum(ends.values())

    def path(self, tensor: TensorInfo) -> Path:
        """The file in which `tensor` lies."""
        return self.directory / tensor.file

    def same_bytes(self, first: TensorInfo, second: TensorInfo) -> bool:
        """Whether two tensors of one shape and type hold the same bytes."""
        with open_file(self.path(first)) as file_a, open_file(self.path(second)) as file_b:
            file_a.seek(first.offset)
            file_b.seek(second.offset)
            for start in range(0, first.size_bytes, COMPARE_BLOCK_BYTES):
                size = min(COMPARE_BLOCK_BYTES, first.size_bytes - start)
                if file_a.read(size) != file_b.read(size):
                    return False
        return True


def open_checkpoint(directory: Path) -> Checkpoint:
    """Read the headers of the safetensors files in `directory`.

    With an index, exactly the files that it names are read, and it must agree with their headers;
    without one, all `model*.safetensors` (else the only `*.safetensors`), which must not share a
    tensor. Variants (`model.fp16.safetensors`) beside them are left alone.

    Raises:
        NotFoundError: there is no such folder.
        RejectedError: no weights, another format, a damaged file, or an index that lies.
    """
    if not directory.is_dir():
        raise NotFoundError(f"{directory}: no such folder")
    index = directory / INDEX_FILE
    if exists(index):
        weight_map = read_weight_map(read_object(index), str(index))
        files = sorted(set(weight_map.values()))
        _refuse_stray_shards(directory, files)
    else:
        weight_map = None
        files = _weight_files(directory)
    headers = {file: read_header(directory / file) for file in files}
    tensors = merge_headers(headers, weight_map, str(directory))
    return Checkpoint(str(directory), tuple(files), tensors, directory)


def merge_headers(
    headers: Mapping[str, Iterable[TensorInfo]],
    weight_map: Mapping[str, str] | None,
    name: str,
) -> dict[str, TensorInfo]:
    """The tensors of several files by name; they must agree with the index if there is one."""
    tensors: dict[str, TensorInfo] = {}
    for infos in headers.values():
        for tensor in infos:
            other = tensors.setdefault(tensor.name, tensor)
            if other is not tensor:
                raise RejectedError(
                    f"{name}: tensor {tensor.name[:80]!r} is in both {other.file} and {tensor.file}"
                )
    if weight_map is not None:
        found = {tensor.name: tensor.file for tensor in tensors.values()}
        wrong = sorted(
            key for key in weight_map.keys() | found.keys() if weight_map.get(key) != found.get(key)
        )
        if wrong:
            key = wrong[0]
            raise RejectedError(
                f"{name}: {INDEX_FILE} and the files disagree on "
                f"{counted(len(wrong), 'tensor')}, first "
                f"{key[:80]!r}: index {weight_map.get(key)}, files {found.get(key)}"
            )
    if not tensors:
        raise RejectedError(f"{name}: the weight files hold no tensors")
    return tensors


def read_weight_map(index: Mapping[str, Any], name: str) -> dict[str, str]:
    """The `weight_map` of an index, each file a plain name ending in `.safetensors`."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise RejectedError(f"{name}: weight_map: expected an object of tensor names")
    for key, file in weight_map.items():
        plain = isinstance(file, str) and file.endswith(".safetensors") and is_plain_name(file)
        if not plain:
            raise RejectedError(
                f"{name}: weight_map: {str(key)[:80]!r} points to {str(file)[:80]!r}; only plain "
                "*.safetensors names inside the folder are allowed"
            )
    return weight_map


def without_variants(names: Iterable[str]) -> list[str]:
    """The weight files of the model itself: variants are left out where there are others.

    A variant is the same model once more, in another type or split otherwise; transformers puts
    its name between `model` and the rest: `model.fp16.safetensors`,
    `model.fp16-00001-of-00002.safetensors`.
    """
    files = sorted(names)
    return [name for name in files if not _VARIANT.fullmatch(name)] or files


def _weight_files(directory: Path) -> list[str]:
    names = without_variants(path.name for path in directory.glob("*.safetensors"))
    files = [name for name in names if name.startswith("model")] or names
    which = not files or not files[0].startswith("model") or _VARIANT.fullmatch(files[0])
    if which and len(files) > 1:
        raise RejectedError(
            f"{directory}: {len(files)} *.safetensors files without {INDEX_FILE}: "
            "which are the model's?"
        )
    if not files:
        others = [path.name for pattern in OTHER_FORMATS for path in directory.glob(pattern)]
        if others:
            raise RejectedError(
                f"{directory}: {sorted(others)[0]}: only safetensors weights are read, never "
                "pickle, GGUF or NumPy files; fetch the safetensors version"
            )
        raise RejectedError(f"{directory}: no *.safetensors; not a model folder with weights")
    return files


def _refuse_stray_shards(directory: Path, files: list[str]) -> None:
    stray = {path.name for path in directory.glob("model*.safetensors")} - set(files)
    stray = {name for name in stray if not _VARIANT.fullmatch(name)}
    if stray:
        raise RejectedError(
            f"{directory}: {sorted(stray)[0]} is not named in {INDEX_FILE}; "
            "remove it or fetch the right index"
        )
