"""What a kernel computes, against float64 and against plain MLX."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from apertus_mlx.backend.metal.kernel import Exact, Kernel, Run
from apertus_mlx.backend.metal.reference import float64
from apertus_mlx.measure.doctor.device import Attempt, UnfitError

REPEATS = 20
SEEDS = (1, 2)
# The float64 form of larger inputs takes seconds; one trial has to do.
LARGE_BYTES = 2**26


def measure(kernel: Kernel, run: Run) -> Attempt:
    """Run `kernel` on its trial inputs, the first of them many times.

    Raises:
        UnfitError: outputs have another shape than the exact ones.
    """
    identical, errors = 0, []
    for seed in SEEDS:
        inputs = kernel.trial(seed)
        mx.eval(inputs)
        outputs = _evaluated(run(inputs))
        if seed == SEEDS[0]:
            first = _bits(outputs)
            again = (_bits(_evaluated(run(inputs))) for _ in range(REPEATS - 1))
            identical = 1 + sum(bits == first for bits in again)
        exact = kernel.exact(inputs)
        found = [float64(output) for output in outputs]
        plain = [float64(output) for output in _evaluated(kernel.plain(inputs))]
        if [one.shape for one in found] != [one.shape for one in exact]:
            raise UnfitError(f"outputs of shapes {[one.shape for one in found]}")
        pairs = ((found, exact), (plain, exact), (found, plain))
        errors.append([_error(one, other, exact) for one, other in pairs])
        if sum(array.nbytes for array in inputs) > LARGE_BYTES:
            break
    return Attempt(REPEATS, identical, *_worst(errors))


def _evaluated(outputs: list[mx.array]) -> list[mx.array]:
    mx.eval(outputs)
    return outputs


def _bits(outputs: Sequence[mx.array]) -> list[bytes]:
    return [np.array(output.reshape(-1).view(mx.uint8)).tobytes() for output in outputs]


def _error(values: Sequence[Exact], reference: Sequence[Exact], scale: Sequence[Exact]) -> float:
    """The worst output's distance from `reference`, relative to the norm of `scale`."""
    distances = [
        float(np.linalg.norm(value - aim) / (np.linalg.norm(exact) or 1.0))
        for value, aim, exact in zip(values, reference, scale, strict=True)
    ]
    return _worst([[distance] for distance in distances])[0]


def _worst(rows: Sequence[Sequence[float]]) -> list[float]:
    """The largest of each column, where nothing is larger than NaN (unlike for Python's `max`)."""
    return [float(value) for value in np.max(np.array(rows, np.float64), axis=0)]
