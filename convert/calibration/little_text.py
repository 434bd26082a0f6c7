"""What is done where there is too little text to rely on calibration: the better of two is kept.

Codes fitted to a few hundred tokens fit those tokens; on other text the best scales for the weights
alone may be closer to the original. On the embedded model at 4 bits calibration began to win from
some hundred tokens on; below `ENOUGH_TOKENS` both are judged, on the texts held out. Where nothing
could be held out nothing shows that calibration helps, and it is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from convert.calibration.calibrated import Calibration
from convert.calibration.judging import Judge
from convert.layerwise import SourceWeights
from convert.plan import Plan
from convert.policy import Request
from convert.reading import Reader

ENOUGH_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class Choice:
    """The plan to follow, and why."""

    plan: Plan
    note: str


def choose(
    plan: Plan,
    make: Callable[[Request], Plan],
    reader: Reader,
    directory: Path,
    calibration: Calibration,
    progress: Callable[[int, int], None],
) -> Choice | None:
    """The better of a calibrated `plan` and the same without texts; None where text is enough.

    Args:
        plan: calibrated.
        make: makes the plan of another request for the same source.
        reader: of the source.
        directory: of the source.
        calibration: the texts.
        progress: told layers done and how many there are.
    """
    tokens = calibration.sample.windows.size
    if tokens >= ENOUGH_TOKENS and calibration.judged.held_out:
        return None
    request = plan.request
    method = "search" if request.method == "gptq" else request.method
    plain = make(replace(request, method=method, smooth=False))
    if not calibration.judged.held_out:
        return Choice(
            plain,
            f"{calibration.sample.name}: {tokens:,} tokens, of which no part could be held out to "
            f"judge by; not calibrated, method {method} is kept",
        )
    judge = Judge(SourceWeights(plan.source, reader), directory, calibration, progress)
    with_texts, without = judge.divergence(plan), judge.divergence(plain)
    kept = plan if with_texts < without else plain
    return Choice(
        kept,
        f"{calibration.sample.name}: {tokens:,} tokens are little to calibrate on, from "
        f"{ENOUGH_TOKENS:,} on they are enough; on texts held out the mean divergence is "
        f"{with_texts:.4g}, without texts {without:.4g}: "
        f"{'the calibrated codes are' if kept is plan else f'method {method} is'} kept",
    )
