"""CPU time to fit one layer of a real size to given moments, beside mlx-lm's GPTQ.

    python -m benchmarks.fit_layer [--size 0.5B] [--bits 4] [--tokens 2048] [--matrices down_proj]
        [--no-mlx-lm]

Weights and inputs are random, the latter correlated. Both sides get the same weights in float32
and the same second moments, ours also what the quantized layers before have cost; groups of 64. A
row says what the process took of the CPU, the system's share included, and what is left of the
objective, relative to rounding as `mx.quantize` does it.
"""

from __future__ import annotations

import argparse
import resource
import sys
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from apertus_mlx.backend import tf32
from apertus_mlx.convert.calibration.fitting import Moments, Objective, fit
from apertus_mlx.quant.affine import dequantize
from apertus_mlx.quant.spec import QuantSpec
from benchmarks.make_checkpoint import GEOMETRIES

GROUP_SIZE = 64
STAGES = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("up_proj",), ("down_proj",))


def main() -> None:
    """Print a row for the matrices of each input, and their sum."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=GEOMETRIES, default="0.5B")
    parser.add_argument("--bits", type=int, choices=(2, 4, 8), default=4)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--matrices", nargs="+", default=[n for names in STAGES for n in names])
    parser.add_argument("--no-mlx-lm", action="store_true")
    arguments = parser.parse_args()
    tf32.switch_off()
    spec = QuantSpec(arguments.bits, GROUP_SIZE)
    print(f"float32 products of 2,048 x 2,048 run at {_gflops():.0f} GFLOP per second of CPU\n")
    print("| matrices | shape | apertus-mlx, s | objective | mlx-lm, s | objective |")
    print("|---|---|---|---|---|---|")
    total = np.zeros(2)
    for weights, moments in _stages(arguments.size, arguments.tokens, arguments.matrices):
        second = np.array(moments.second)
        before = _cpu_s()
        weight = np.concatenate(list(weights.values()))
        codes = fit(weight, spec, Objective.of(moments, 0.5), "BF16")
        seconds = [_cpu_s() - before, 0.0]
        shares = [_share(dequantize(codes), weight, second, spec), ""]
        if not arguments.no_mlx_lm:
            before = _cpu_s()
            theirs = [_mlx_lm(weight, second, spec) for weight in weights.values()]
            seconds[1] = _cpu_s() - before
            shares[1] = _share(np.concatenate(theirs), weight, second, spec)
        total += seconds
        cells = (", ".join(weights), f"{weight.shape[0]} x {weight.shape[1]}")
        print(
            f"| {' | '.join(cells)} | {seconds[0]:.2f} | {shares[0]} | {seconds[1]:.2f} | "
            f"{shares[1]} |",
            flush=True,
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"| all | | {total[0]:.2f} | | {total[1]:.2f} | |\n")
    print(f"peak of the process: {peak / (1e9 if sys.platform == 'darwin' else 1e6):.2f} GB")


def _stages(
    size: str, tokens: int, wanted: list[str]
) -> Iterator[tuple[dict[str, np.ndarray], Moments]]:
    hidden, _, heads, kv_heads, inner, *_ = GEOMETRIES[size]
    keys = hidden // heads * kv_heads
    rows = {"q_proj": hidden, "k_proj": keys, "v_proj": keys, "up_proj": inner}
    draw = np.random.default_rng(0)
    for names in STAGES:
        columns = inner if names == ("down_proj",) else hidden
        weights = {
            name: (0.02 * draw.standard_normal((rows.get(name, hidden), columns))).astype(
                np.float32
            )
            for name in names
            if name in wanted
        }
        if not weights:
            continue
        moments = Moments(*weights.values())
        sizes = np.exp(0.5 * draw.standard_normal(columns)).astype(np.float32)
        for start in range(0, tokens, 1024):
            inputs = draw.standard_normal((min(1024, tokens - start), columns), np.float32) * sizes
            inputs[:, 1:] += 0.5 * inputs[:, :-1]
            other = inputs + 0.05 * draw.standard_normal(inputs.shape, np.float32)
            moments.add(mx.array(inputs), mx.array(other))
        yield weights, moments


def _mlx_lm(weight: np.ndarray, second: np.ndarray, spec: QuantSpec) -> np.ndarray:
    """What `gptq_quantize` makes of one matrix whose moments are known."""
    from mlx_lm.quant import gptq

    given = mx.array(second)
    mx.eval(given)

    class Known(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()  # type: ignore[no-untyped-call]
            self.module, self.H = module, given

    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = mx.array(weight)
    catcher, gptq.Catcher = gptq.Catcher, Known
    try:
        form = (spec.bits, spec.group_size)
        model, _ = gptq.gptq_quantize(nn.Sequential(linear), mx.zeros((0, 1)), *form, *form)
    finally:
        gptq.Catcher = catcher
    found: Any = model.layers[0]
    return np.array(
        mx.dequantize(found.weight, found.scales, found.biases, spec.group_size, spec.bits)
    )


def _share(values: np.ndarray, weight: np.ndarray, second: np.ndarray, spec: QuantSpec) -> str:
    plain = mx.dequantize(
        *mx.quantize(mx.array(weight), spec.group_size, spec.bits), spec.group_size, spec.bits
    )
    # Rows enough for three digits.
    few = slice(None, None, -(-len(weight) // 128))
    left, whole = (
        float(np.vdot(off @ second, off))
        for off in (values[few] - weight[few], np.array(plain)[few] - weight[few])
    )
    return f"{left / whole:.3f}"


def _gflops() -> float:
    """How quick this machine is at the moment; other programs on it slow the CPU as well."""
    matrix = np.random.default_rng(0).standard_normal((2048, 2048), np.float32)
    before = _cpu_s()
    for _ in range(4):
        matrix @ matrix
    return float(4 * 2 * 2.048**3 / (_cpu_s() - before))


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
