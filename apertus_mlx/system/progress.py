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
        done: units that are done, in layers also parts of one.
        total: how many there are; None where that is not known.
        unit: what is counted.
        detail: more about the stage, such as a loss; may be empty.
    """

    stage: str
    done: float
    total: float | None
    unit: Literal["bytes", "layers", "tokens"]
    detail: str = ""


OnProgress = Callable[[Progress], None]
