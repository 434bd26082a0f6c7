"""Names for what is written beside its final place and then renamed."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

# Most bytes of a name on every file system that is in use (APFS: characters, which are not more).
MAX_NAME_BYTES = 255


def beside(path: Path, ending: str) -> Path:
    """The hidden neighbour `.NAME` + `ending` of `path`; a NAME too long for that is shortened.

    Whatever file system takes the name of `path` takes this one. The same path and ending give the
    same neighbour; a hash keeps those of two long names apart.
    """
    name = os.fsencode(path.name)
    room = MAX_NAME_BYTES - 1 - len(os.fsencode(ending))
    if len(name) <= room:
        return path.with_name(f".{path.name}{ending}")
    digest = hashlib.sha256(name).hexdigest()[:16]
    # Cutting may leave a part of a character; without it the name stays text.
    kept = name[: room - len(digest) - 1].decode("utf-8", "ignore")
    return path.with_name(f".{kept}-{digest}{ending}")
