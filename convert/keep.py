"""What a long piece of work has reached, in a file: an interrupted one goes on from there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from convert.array_file import load_arrays, save_arrays

_FACTS = "facts"


class Keep:
    """Arrays and plain facts in one file, of which a later saving replaces all.

    The file is there whole or not at all; one that is damaged counts as absent. Without a path
    nothing is kept.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def save(self, facts: Mapping[str, Any], arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Replace what was kept.

        Args:
            facts: what JSON can say; its numbers come back exactly.
            arrays: by name.
        """
        if self._path is None:
            return
        save_arrays(self._path, {_FACTS: np.array(json.dumps(dict(facts))), **arrays})

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
