"""The state of long work in a file, from which an interrupted run goes on."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from apertus_mlx.convert.write.array_file import load_arrays, save_arrays

_FACTS = "facts"


class Keep:
    """Arrays and plain facts in one file; each save replaces all of it.

    The file is there whole or not at all; one that is damaged counts as absent. Without a path
    nothing is kept.

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

    def reach(self, facts: Mapping[str, Any], arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Save, unless the last save was less than `least_s` ago."""
        if self._clock() - self._saved_s >= self.least_s:
            self.save(facts, arrays)

    def save(self, facts: Mapping[str, Any], arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Replace what was kept.

        Args:
            facts: what JSON can say; its numbers come back exactly.
            arrays: by name.
        """
        if self._path is None:
            return
        save_arrays(self._path, {_FACTS: np.array(json.dumps(dict(facts))), **arrays})
        self._saved_s = self._clock()

    def load(self) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]] | None:
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
