"""The token with the largest logit, from the peaks that the head leaves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from apertus_mlx.backend.metal import reference
from apertus_mlx.backend.metal.kernel import Exact, Kernel, KernelText, Launch
from apertus_mlx.backend.metal.text import specialised

_SOURCE = """
  threadgroup float bests[32];
  threadgroup uint indices[32];
  apertus::best_token(
      peaks, peak_tokens, token, thread_index_in_threadgroup, simdgroup_index_in_threadgroup,
      thread_index_in_simdgroup, bests, indices);
"""


@dataclass(frozen=True, slots=True)
class BestToken(Kernel):
    """`mx.argmax` of logits, from the peaks of their tiles.

    Inputs: peaks float32 `[count]` and their tokens uint32 `[count]`, ascending. Output: the
    token, uint32 `[1]`; of equal peaks that of the first, and where none is above minus infinity
    the first of all.
    """

    count: int

    def __post_init__(self) -> None:
        # MLX hands arrays of fewer than 8 elements over in another address space.
        if self.count < 8:
            raise ValueError(f"{self.count} peaks: the kernel wants 8 at least")

    @property
    def place(self) -> str:
        return f"best_token-{self.count}"

    @property
    def threads(self) -> int:
        """Threads of the one threadgroup: whole simdgroups."""
        return min(1024, -(-self.count // 32) * 32)

    def text(self) -> KernelText:
        inputs, outputs = ("peaks", "peak_tokens"), ("token",)
        return specialised(self, inputs, outputs, _SOURCE, ("best_token",), "COUNT THREADS")

    def launch(self, inputs: Sequence[mx.array]) -> Launch:  # noqa: ARG002 - all have one shape
        threads = (self.threads, 1, 1)
        return Launch(threads, threads, ((1,),), (mx.uint32,))

    def trial(self, seed: int) -> list[mx.array]:
        values, places = mx.random.split(mx.random.key(seed))
        steps = mx.random.randint(0, 8, (self.count,), key=places)
        tokens = 8 * mx.arange(self.count) + steps
        peaks = mx.random.normal((self.count,), key=values)
        return [peaks, tokens.astype(mx.uint32)]

    def plain(self, inputs: Sequence[mx.array]) -> list[mx.array]:
        peaks, tokens = inputs
        return [tokens[mx.argmax(peaks, keepdims=True)]]

    def exact(self, inputs: Sequence[mx.array]) -> list[Exact]:
        peaks, tokens = (reference.float64(values) for values in inputs)
        return [tokens[[int(np.argmax(peaks))]]]

    @property
    def tolerance(self) -> float:
        """See `Kernel.tolerance`: tokens are right or wrong."""
        return 0.0
