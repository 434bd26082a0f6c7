"""How far work is: what functions named `progress` are called with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a stage of some work is.

    Attributes:
        stage: what is being done, such as `downloading` or `converting`.
        done: units that are done.
        total: how many there are; None where that is not known.
        unit: what is counted; `layers` counts runs through a layer, forwards or backwards: a layer
            counts each time, and comparing logits as the layers that have as many weights.
        detail: more about the stage, such as a loss; may be empty.
    """

    stage: str
    done: int
    total: int | None
    unit: Literal["bytes", "layers", "tokens", "requests"]
    detail: str = ""


OnProgress = Callable[[Progress], None]
# Told a stage, runs through layers that are done, and how many there are.
OnLayers = Callable[[str, int, int], None]
