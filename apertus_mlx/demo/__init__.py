"""The tiny Apertus-architecture model that ships inside the package.

It is a demonstration and a quantization test bed; ``recipe`` holds the code that made it.
"""

from __future__ import annotations

import logging
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from apertus_mlx.system.progress import OnProgress

__all__ = ["locate", "model_dir"]


def model_dir() -> Path:
    """Return the folder that holds the embedded model's files."""
    return Path(__file__).resolve().parent / "model"


def locate(
    model: str | PathLike[str] | None,
    revision: str | None,
    offline: bool,
    progress: OnProgress | None,
) -> Path:
    """The folder of `model`, see `hub.locate`; the embedded one by default."""
    if model is None:
        logging.getLogger("apertus_mlx").info(
            "using the small demonstration model in the package, since no other is named"
        )
        return model_dir()
    from apertus_mlx import hub

    return hub.locate(model, revision=revision, offline=offline, progress=progress)
