"""How long one call of a kernel takes amid others that wait for each other, as in decoding."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median

import mlx.core as mx

from apertus_mlx.backend.metal.kernel import Kernel, Run

# Weights of a step come from memory, never from a cache: take turns among more copies than the
# largest one of a chip (96 MB) holds.
ROTATION_BYTES = 2**28
MAX_COPIES = 512
# The shorter of two chains; the difference of the two is what the time of a call comes from.
CHAIN_S = 0.01
MIN_LENGTH, MAX_LENGTH = 8, 512
PAIRS = 3


class Chain:
    """Calls of `kernel`, or of its plain form, each of which needs what the one before made."""

    def __init__(self, kernel: Kernel, run: Run) -> None:
        self._forms: dict[bool, Run] = {True: run, False: kernel.plain}
        inputs = kernel.trial(0)
        size = sum(array.nbytes for array in inputs)
        copies = min(max(-(-ROTATION_BYTES // size), 2), MAX_COPIES)
        self._copies = [[array + mx.zeros_like(array) for array in inputs] for _ in range(copies)]
        mx.eval(self._copies)
        self._next = 0
        self._length = MIN_LENGTH
        for fused in (True, False):
            self._run(fused, MIN_LENGTH)
        each = self._run(False, MIN_LENGTH) / MIN_LENGTH
        self._length = min(max(int(CHAIN_S / each), MIN_LENGTH), MAX_LENGTH)

    def seconds(self, fused: bool) -> float:
        """Seconds that a call takes; what is the same for chains of any length does not count."""
        return median(self._difference(fused) for _ in range(PAIRS)) / self._length

    def _difference(self, fused: bool) -> float:
        short = self._run(fused, self._length)
        return max(self._run(fused, 2 * self._length) - short, 0.0)

    def _run(self, fused: bool, length: int) -> float:
        """Seconds from handing over a chain to its end."""
        form = self._forms[fused]
        outputs: list[mx.array] | None = None
        for _ in range(length):
            inputs = self._copies[self._next % len(self._copies)]
            self._next += 1
            outputs = form(inputs if outputs is None else linked(inputs, outputs))
        mx.synchronize()
        started = time.perf_counter()
        mx.eval(outputs)
        return time.perf_counter() - started


def linked(inputs: Sequence[mx.array], outputs: Sequence[mx.array]) -> list[mx.array]:
    """`inputs`, of which the first now comes from `outputs`; costs nothing if it can be a view.

    What is computed then means nothing, but takes as long.
    """
    first, output = inputs[0], outputs[0].reshape(-1)
    if not mx.issubdtype(first.dtype, mx.floating):
        # An index has to stay one; this link only keeps the order.
        return list(mx.depends(list(inputs), list(outputs)))
    if output.dtype == first.dtype and output.size >= first.size:
        return [output[: first.size].reshape(first.shape), *inputs[1:]]
    return [first + output[0].astype(first.dtype), *inputs[1:]]
