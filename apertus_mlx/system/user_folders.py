"""Where this user's files of ours are, as the platform has it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

CACHE_VARIABLE = "APERTUS_MLX_CACHE"


def cache_folder() -> Path:
    """Where this user's caches of ours are; `APERTUS_MLX_CACHE` names another place."""
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "apertus-mlx"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "apertus-mlx"
