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
        for tensor in tensors:
            path = str(checkpoint.path(tensor))
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
            RejectedError: a file was changed, replaced or removed since it was opened.
        """
        for index in ids:
            self._require(index)
        found = [
            b"".join([os.pread(number, size, offset + index * size) for index in ids])
            for number, offset, size in self._places
        ]
        self.require_unchanged()
        return found

    def read_into(self, index: int, targets: Sequence[Any]) -> None:
        """Read a single row: for each matrix its bytes into one of `targets`.

        Args:
            index: of the row.
            targets: what can be written to, each as long as a row of its matrix.

        Raises:
            ValueError: there is no such row.
            RejectedError: a file was changed, replaced or removed since it was opened.
        """
        self._require(index)
        for (number, offset, size), target in zip(self._places, targets, strict=True):
            done = more = os.preadv(number, (target,), offset + index * size)
            # A file system may give less than there is; of a file that was cut off nothing comes.
            while more and done < size:
                rest = memoryview(target)[done:]
                more = os.preadv(number, (rest,), offset + index * size + done)
                done += more
        self.require_unchanged()

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


def _state(status: os.stat_result) -> tuple[int, ...]:
    """What shows that a file is the same, with the same bytes."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
