"""Arrays in files of our own, and the state of long work, from which an interrupted run goes on.

A file is there whole or not at all; a damaged one counts as absent.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from apertus_mlx.system.model_files import checked, exists
from apertus_mlx.system.whole_file import whole_file

_FACTS = "facts"


_Array = npt.NDArray[Any]


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


class Keep:
    """Arrays and plain facts in one file; each save replaces all of it.

    Without a path nothing is kept.

    Args:
        path: the file.
        clock: seconds that never go back.
    """

    # Seconds between two savings of `reach`. A model of 8B parameters has gigabytes to save after
    # every layer; going on repeats so much work, or one layer where that takes longer.
    least_s: ClassVar[float] = 60.0

    def __init__(self, path: Path | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        self._saved_s = clock()

    def reach(self, facts: Mapping[str, Any], arrays: Mapping[str, _Array]) -> None:
        """Save, unless the last save was less than `least_s` ago."""
        if self._clock() - self._saved_s >= self.least_s:
            self.save(facts, arrays)

    def save(self, facts: Mapping[str, Any], arrays: Mapping[str, _Array]) -> None:
        """Replace what was kept.

        Args:
            facts: what JSON can say; its numbers come back exactly.
            arrays: by name.
        """
        if self._path is None:
            return
        save_arrays(self._path, {_FACTS: np.array(json.dumps(dict(facts))), **arrays})
        self._saved_s = self._clock()

    def load(self) -> tuple[dict[str, Any], dict[str, _Array]] | None:
        """Facts and arrays as they were saved last; None where there is nothing whole."""
        if self._path is None:
            return None
        arrays = load_arrays(self._path)
        facts = None if arrays is None else arrays.pop(_FACTS, None)
        return None if arrays is None or facts is None else (json.loads(str(facts)), arrays)

    def discard(self) -> None:
        """Forget what was kept."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)


NOTHING = Keep(None)
