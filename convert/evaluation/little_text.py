"""What is done where there is too little text to rely on calibration: the better of two is kept.

Codes fitted to a sentence fit that sentence; on other text the best scales for the weights alone
may be closer to the original. On the embedded model at 4 bits, judged on texts of twenty languages,
search diverges by 0.0857 nats. Calibrated on one sentence (13 tokens) it is 0.0948, on the same
sentence 40 times (442 tokens) 0.0988; on 64, 256, 1,024 and 4,096 tokens of the package's texts
0.0605, 0.0563, 0.0394 and 0.0283. So it is what the text says that counts, not its length alone:
below `ENOUGH_TOKENS`, well above what was seen to do harm, both are judged on the texts held out.
Where nothing could be held out nothing shows that calibration helps, and it is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from apertus_mlx.convert.calibration.calibrated import Calibration
from apertus_mlx.convert.calibration.held_out_comparison import HeldOutComparison
from apertus_mlx.convert.evaluation.layerwise import SourceWeights
from apertus_mlx.convert.plan.plan import Plan
from apertus_mlx.convert.plan.policy import Method, Request
from apertus_mlx.convert.sources.reading import Reader

ENOUGH_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class Choice:
    """The plan to follow, and why."""

    plan: Plan
    note: str


def is_little(calibration: Calibration) -> bool:
    """Whether `choose` has to judge."""
    return calibration.judged.held_out and calibration.sample.windows.size < ENOUGH_TOKENS


def without_judging(
    plan: Plan, make: Callable[[Request], Plan], calibration: Calibration
) -> Choice | None:
    """The plan without texts where nothing could be held out; None where text is enough.

    Args:
        plan: calibrated.
        make: makes the plan of another request for the same source.
        calibration: the texts; not `is_little`.
    """
    if calibration.judged.held_out:
        return None
    plain, method = _without_texts(plan, make)
    return Choice(
        plain,
        f"{calibration.sample.name}: {calibration.sample.windows.size:,} tokens, of which no part "
        f"could be held out to judge by; not calibrated, method {method} is kept",
    )


def choose(
    plan: Plan,
    make: Callable[[Request], Plan],
    reader: Reader,
    directory: Path,
    calibration: Calibration,
    progress: Callable[[int, int], None],
    folder: Path,
) -> Choice:
    """The better of a calibrated `plan` and the same without texts.

    Args:
        plan: calibrated.
        make: makes the plan of another request for the same source.
        reader: of the source.
        directory: of the source.
        calibration: the texts; `is_little`.
        progress: told layers done and how many there are.
        folder: where an interrupted run with the same arguments has kept what it measured.
    """
    plain, method = _without_texts(plan, make)
    comparison = HeldOutComparison(
        SourceWeights(plan.source, reader), directory, calibration, progress, folder
    )
    with_texts, without = comparison.divergence(plan), comparison.divergence(plain)
    kept = plan if with_texts < without else plain
    return Choice(
        kept,
        f"{calibration.sample.name}: {calibration.sample.windows.size:,} tokens are little to "
        f"calibrate on, from {ENOUGH_TOKENS:,} on they are enough; on texts held out the mean "
        f"divergence is {with_texts:.4g}, without texts {without:.4g}: "
        f"{'the calibrated codes are' if kept is plan else f'method {method} is'} kept",
    )


def _without_texts(plan: Plan, make: Callable[[Request], Plan]) -> tuple[Plan, str]:
    request = plan.request
    method: Method = "search" if request.method == "gptq" else request.method
    return make(replace(request, method=method, smooth=False)), method
