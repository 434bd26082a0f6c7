"""Single rows of stored matrices, read where they lie each time that they are needed.

The files are held open and may not change: each read looks at their size, their time of
modification and whether their names still lead to them.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from apertus_mlx.checkpoint.header import TensorInfo
from apertus_mlx.checkpoint.tensors import Checkpoint
from apertus_mlx.errors import RejectedError
from apertus_mlx.system.model_files import open_file


class StoredRows:
    """The rows of matrices that belong together, as codes, scales and biases do.

    Attributes:
        tensors: the matrices, all `[rows, ...]` with the same number of rows.
    """

    def __init__(self, checkpoint: Checkpoint, tensors: Sequence[TensorInfo]) -> None:
        """Open the files that hold `tensors`.

        Raises:
            RejectedError: one is missing or no regular file of the folder.
        """
        self.tensors = tuple(tensors)
        self._rows = tensors[0].shape[0]
        # Name -> descriptor, and what must not change.
        self._files: dict[str, tuple[int, tuple[int, ...]]] = {}
        self._places: list[tuple[int, int, int]] = []
        self._paths = [str(checkpoint.path(tensor)) for tensor in tensors]
        for tensor, path in zip(tensors, self._paths, strict=True):
            if path not in self._files:
                with open_file(Path(path)) as file:
                    number = os.dup(file.fileno())
                # At exit a thread may still read.
                weakref.finalize(self, os.close, number).atexit = False
                self._files[path] = number, _state(os.fstat(number))
            row_bytes = tensor.size_bytes // tensor.shape[0]
            self._places.append((self._files[path][0], tensor.offset, row_bytes))

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of all matrices together."""
        return sum(row_bytes for _, _, row_bytes in self._places)

    def read(self, ids: Sequence[int]) -> list[bytes]:
        """For each matrix the bytes of these rows, one after the other.

        Raises:
            ValueError: there is no such row.
            RejectedError: a file was changed, replaced or removed since it was opened, or ends too
                early.
        """
        for index in ids:
            self._require(index)
        found = [
            b"".join([_read(number, size, offset + index * size) for index in ids])
            for number, offset, size in self._places
        ]
        self.require_unchanged()
        for matrix, (data, (_, _, size)) in enumerate(zip(found, self._places, strict=True)):
            if len(data) < len(ids) * size:
                raise self._cut_off(matrix)
        return found

    def read_into(self, index: int, targets: Sequence[Any]) -> None:
        """Read a single row: for each matrix its bytes into one of `targets`.

        Args:
            index: of the row.
            targets: what can be written to, each as long as a row of its matrix.

        Raises:
            ValueError: there is no such row.
            RejectedError: a file was changed, replaced or removed since it was opened, or ends too
                early.
        """
        self._require(index)
        short = None
        for matrix, (place, target) in enumerate(zip(self._places, targets, strict=True)):
            number, offset, size = place
            done = more = os.preadv(number, (target,), offset + index * size)
            # A file system may give less than there is; of a file that was cut off nothing comes.
            while more and done < size:
                rest = memoryview(target)[done:]
                more = os.preadv(number, (rest,), offset + index * size + done)
                done += more
            if done < size:
                short = matrix
        self.require_unchanged()
        if short is not None:
            raise self._cut_off(short)

    def _cut_off(self, matrix: int) -> RejectedError:
        # It was so when it was opened, or its state would tell.
        return RejectedError(
            f"{self._paths[matrix]}: ends before {self.tensors[matrix].name} does; the file was "
            "cut off, fetch or convert it again"
        )

    def _require(self, index: int) -> None:
        if not 0 <= index < self._rows:
            raise ValueError(f"token {index}: the vocabulary has {self._rows}")

    def require_unchanged(self) -> None:
        """Refuse files that have changed: after reading, so that what was read is what it was.

        Raises:
            RejectedError: a file was changed, replaced or removed since it was opened.
        """
        # A file that is cut off has changed. A name that still leads to the file that is open tells
        # of that one, too.
        for path, (_, state) in self._files.items():
            try:
                same = _state(os.stat(path)) == state  # noqa: PTH116 - half the time of a Path's
            except OSError:
                same = False
            if not same:
                raise RejectedError(f"{path}: was changed while the model is in use; load it again")


def _read(number: int, size: int, offset: int) -> bytes:
    """So many bytes, or those up to the end of the file; a file system may give less at a time."""
    data = more = os.pread(number, size, offset)
    while more and len(data) < size:
        more = os.pread(number, size - len(data), offset + len(data))
        data += more
    return data


def _state(status: os.stat_result) -> tuple[int, ...]:
    """What shows that a file is the same, with the same bytes."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
