"""Where this user's files of ours are, as the platform has it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from apertus_mlx.errors import ResourceError

CACHE_VARIABLE = "APERTUS_MLX_CACHE"


def cache_folder() -> Path:
    """Where this user's caches of ours are; `APERTUS_MLX_CACHE` names another place.

    Raises:
        ResourceError: the user has no home, as in some containers.
    """
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen)
    stated = os.environ.get("XDG_CACHE_HOME", "")
    # By the XDG specification a relative one does not count.
    if sys.platform != "darwin" and stated.startswith("/"):
        return Path(stated) / "apertus-mlx"
    try:
        home = Path.home()
    except RuntimeError:
        raise ResourceError(
            f"this user has no home to keep caches in; {CACHE_VARIABLE} names a folder for them"
        ) from None
    caches = home / "Library" / "Caches" if sys.platform == "darwin" else home / ".cache"
    return caches / "apertus-mlx"
