"""Arrays in files of our own that are there whole or not at all; a damaged one counts as absent."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from apertus_mlx.system.model_files import checked, exists
from apertus_mlx.system.whole_file import whole_file

_Array = npt.NDArray[Any]


def save_array(path: Path, array: _Array) -> None:
    """Write one array to `path`, a name that ends in `.npy`."""
    with whole_file(path) as unfinished:
        np.save(unfinished, array)


def map_array(path: Path) -> _Array:
    """The array in `path`, read as it is used.

    Raises:
        RejectedError: it is missing or no regular file.
        ValueError, EOFError: it is shorter than it says.
    """
    array: _Array = np.load(checked(path), mmap_mode="r")
    return array


def is_whole(path: Path) -> bool | None:
    """Whether `path` holds as long an array as it says; None where there is no such file.

    Raises:
        RejectedError: it is no regular file.
    """
    if not exists(path):
        return None
    try:
        map_array(path)
    except (ValueError, EOFError):
        return False
    return True


def save_arrays(path: Path, arrays: Mapping[str, _Array]) -> None:
    """Write several arrays to `path`, a name that ends in `.npz`."""
    named: Any = dict(arrays)
    with whole_file(path) as unfinished:
        np.savez(unfinished, **named)


def load_arrays(path: Path) -> dict[str, _Array] | None:
    """All arrays in `path`, each compared with its checksum; None where there is nothing whole.

    Raises:
        RejectedError: it is no regular file.
    """
    if not exists(path):
        return None
    real = checked(path)
    try:
        with np.load(real) as saved:
            return {name: saved[name] for name in saved.files}
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001 - what a damaged archive makes zipfile raise has no base
        return None
