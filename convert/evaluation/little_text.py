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

from collections.abc import Callable, Sequence
from dataclasses import replace

from apertus_mlx.convert.calibration.calibrated import Calibration
from apertus_mlx.convert.plan.plan import Plan
from apertus_mlx.convert.plan.policy import Method, Request
from apertus_mlx.system.sizes import counted

ENOUGH_TOKENS = 4096


def choose(
    plan: Plan,
    make: Callable[[Request], Plan],
    calibration: Calibration,
    judge: Callable[[Sequence[Plan]], list[float]],
) -> tuple[Plan, str | None]:
    """The better of a calibrated `plan` and the same without texts, and what to say about it.

    Args:
        plan: calibrated.
        make: makes the plan of another request for the same source.
        calibration: the texts.
        judge: measures the divergence of plans on texts held out, where there is little to see.
    """
    tokens, held_out = calibration.sample.windows.size, calibration.judged.held_out
    request = plan.request
    if held_out and tokens >= ENOUGH_TOKENS and not request.compare:
        return plan, None
    method: Method = "search" if request.method == "gptq" else request.method
    plain = make(replace(request, method=method, smooth=False, tune=False))
    text = f"{calibration.sample.name}: {counted(tokens, 'token')}"
    if not held_out:
        return plain, (
            f"{text}, of which no part could be held out to judge by; not calibrated, method "
            f"{method} is kept"
        )
    with_texts, without = judge([plan, plain])
    kept = plan if with_texts < without else plain
    if tokens < ENOUGH_TOKENS:
        text += f" are little to calibrate on, from {ENOUGH_TOKENS:,} on they are enough"
    return kept, (
        f"{text}; on texts held out the mean divergence is {with_texts:.4g}, without texts "
        f"{without:.4g}: "
        f"{'the calibrated codes are' if kept is plan else f'method {method} is'} kept"
    )
