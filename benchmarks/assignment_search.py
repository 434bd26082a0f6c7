"""What searches for codes find beyond the minimum near which descent ends.

    python -m benchmarks.assignment_search [--bits 2 3] [--iterations 400] [--rows 128]

The matrices are those of the embedded model's first layer, with the second moments of its own
inputs. Each weight has a distribution over levels: all four at 2 bits, else five around the start.
It is drawn with Gumbel noise at a temperature that falls from 2 to 0.05, and learns by sign steps
(Lion, "Symbolic Discovery of Optimization Algorithms", arXiv 2302.06675) at a rate that falls to
nothing along a cosine; scales are fitted again on the way. This is the manner of GSQ (arXiv
2604.18556), on the objective that GPTQ has. The likeliest levels are then lowered by the same
descent. Beside it stand more of the descent alone, and annealing (`quant.annealing`), which takes
the place of descent in calibration and so begins where that begins. Shares are of the objective
that descent leaves.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial

import mlx.core as mx
import numpy as np

from apertus_mlx.convert.calibration.fitting import Moments, Objective
from apertus_mlx.convert.evaluation.layerwise import Layer, open_weights
from apertus_mlx.convert.sources.reading import Reader
from apertus_mlx.hub.demo import model_dir
from apertus_mlx.quant import annealing, descent, gptq
from apertus_mlx.quant.columns import Columns
from apertus_mlx.quant.curvature import Curvature
from apertus_mlx.quant.groupwise import fit_in_groups
from apertus_mlx.quant.spec import QuantSpec
from tests.trained_model import recipe_windows

GROUP_SIZE = 64
WINDOWS, LENGTH, SEED = 48, 256, 5
# Levels around the start where there are more than four.
NEIGHBOURS = 2
TEMPERATURES = 2.0, 0.05
# Of Lion; and by how much the logit of the start is ahead.
RATE, MOMENTUM, AVERAGE, AHEAD = 0.05, 0.9, 0.99, 2.0
# Nats of a logit.
STEEPNESS = 4
# Iterations between two fits of scales and biases.
REFIT_EVERY = 20
# Of descent alone: it has long come to rest.
ROUNDS = 20
# So that annealing takes about as long as the relaxed search.
LONGER = 20


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--iterations", type=int, nargs="+", default=[400])
    parser.add_argument("--rows", type=int, default=128, help="of each matrix")
    given = parser.parse_args()
    print("| bits | matrices | search | objective | seconds of CPU |")
    print("|---|---|---|---|---|", flush=True)
    for bits in given.bits:
        for name, weight, objective in _matrices(given.rows):
            for search, share, seconds in _compared(weight, bits, objective, given.iterations):
                print(f"| {bits} | {name} | {search} | {share:.3f} | {seconds:.2f} |", flush=True)


def _compared(
    weight: np.ndarray, bits: int, objective: Objective, iterations: list[int]
) -> Iterator[tuple[str, float, float]]:
    """Each search, its share of the objective, and its seconds."""
    spec, curvature = QuantSpec(bits, GROUP_SIZE), objective.curvature
    target, grouped = np.ascontiguousarray(weight.T), curvature.in_groups(GROUP_SIZE)
    assert grouped is not None
    begun = fit_in_groups(target, spec, grouped, "BF16")
    start = descent.improve(target, begun, curvature, rounds=1)
    whole = float(gptq.row_errors(target, start, curvature).sum())
    searches: dict[str, Callable[[], Columns]] = {
        "more descent": lambda: descent.improve(target, start, curvature, rounds=ROUNDS),
        "annealing": lambda: annealing.anneal(target, begun, curvature),
        f"annealing, {LONGER} times as long": lambda: annealing.anneal(
            target, begun, curvature, rounds=LONGER * annealing.ROUNDS
        ),
    }
    for count in iterations:
        searches[f"relaxed, {count} iterations"] = partial(relaxed, target, start, curvature, count)
    for search, run in searches.items():
        before = time.process_time()
        found = run()
        seconds = time.process_time() - before
        yield search, float(gptq.row_errors(target, found, curvature).sum()) / whole, seconds


def relaxed(target: np.ndarray, start: Columns, curvature: Curvature, iterations: int) -> Columns:
    """Codes for `target` `[columns, rows]` that are at least as good as `start`, row by row."""
    draw = np.random.default_rng(0)
    spec, top = start.spec, (1 << start.spec.bits) - 1
    levels = _levels(start.codes, top)
    logits = np.where(levels == start.codes, AHEAD, 0.0).astype(np.float32)
    logits[(levels < 0) | (levels > top)] = -np.inf
    usable = np.isfinite(logits)
    momentum = np.zeros_like(logits)
    best, scales, biases = start, start.scales, start.biases
    first, last = TEMPERATURES
    for step in range(iterations):
        done = step / iterations
        temperature = first * (last / first) ** done
        rate = RATE * 0.5 * (1 + np.cos(np.pi * done))
        noise = -np.log(-np.log(draw.uniform(1e-6, 1 - 1e-6, logits.shape).astype(np.float32)))
        shares = logits * STEEPNESS + noise
        shares /= temperature
        shares -= shares.max(0)
        np.exp(shares, out=shares)
        shares /= shares.sum(0)
        codes = np.einsum("lcr,lcr->cr", shares, levels)
        wide = [np.repeat(array, spec.group_size, axis=0) for array in (scales, biases)]
        slope = (curvature.moments @ (codes * wide[0] + wide[1] - target)) * wide[0]
        gradient = shares * (levels - codes) * slope
        update = np.sign(MOMENTUM * momentum + (1 - MOMENTUM) * gradient)
        logits[usable] -= rate * update[usable]
        momentum = AVERAGE * momentum + (1 - AVERAGE) * gradient
        if (step + 1) % REFIT_EVERY == 0 or step + 1 == iterations:
            hard = np.take_along_axis(levels, logits.argmax(0)[None], 0)[0]
            found = descent.improve(
                target, Columns(hard, scales, biases, spec), curvature, rounds=1
            )
            scales, biases = found.scales, found.biases
            best = gptq.better_rows(target, best, found, curvature)
    return best


def _levels(codes: np.ndarray, top: int) -> np.ndarray:
    """Levels that each weight can have, `[levels, columns, rows]`; some may not exist."""
    if top <= 3:
        every = np.arange(top + 1, dtype=np.float32)[:, None, None]
        return every + np.zeros_like(codes)
    around = np.arange(-NEIGHBOURS, NEIGHBOURS + 1, dtype=np.float32)[:, None, None]
    return around + codes


def _matrices(rows: int) -> Iterator[tuple[str, np.ndarray, Objective]]:
    """Some rows of the first layer's matrices, and their objectives."""
    windows = recipe_windows(SEED, WINDOWS, LENGTH)
    directory = model_dir()
    with Reader(directory) as reader:
        weights = open_weights(directory, reader)
        layer, stream = Layer(weights, 0), mx.array(weights.matrix("model.embed_tokens")[windows])
        for stage, names in enumerate(Layer.STAGES):
            inputs = layer.stage_input(stage, stream)
            matrices = [np.array(layer.projections[name].weight) for name in names]
            moments = Moments(*matrices)
            moments.add(inputs, inputs)
            # The search beside is NumPy's.
            moments.second, moments.cross = (
                np.array(array) for array in (moments.second, moments.cross)
            )
            weight = np.ascontiguousarray(np.concatenate(matrices)[:rows])
            yield ", ".join(names), weight, Objective.of(moments, 0.0)
            if stage in (1, 3):
                stream = layer.add(stage, stream, inputs)


if __name__ == "__main__":
    main()
