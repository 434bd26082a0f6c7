"""What a fused kernel is: its text for one specialisation, how it is launched, what it must equal.

Everything here is data and pure functions, so that a kernel can be compiled by Metal, run by
another machine's stand-in for it, counted, timed or refused by the same code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from typing import Any, Protocol

import mlx.core as mx
import numpy as np
import numpy.typing as npt

Exact = npt.NDArray[np.float64]
# Runs a compiled kernel on its inputs.
Run = Callable[[Sequence[mx.array]], list[mx.array]]
# `mx.fast.metal_kernel`, or what stands in for it: makes a function that launches a kernel.
Factory = Callable[..., Callable[..., list[mx.array]]]


@dataclass(frozen=True, slots=True)
class KernelText:
    """What `mx.fast.metal_kernel` is given; constants of the specialisation are baked in."""

    name: str
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    # The body of the kernel; MLX writes its signature from the names that occur in it.
    source: str
    # Functions and constants before it.
    header: str


@dataclass(frozen=True, slots=True)
class Launch:
    """How many threads run, and what comes out."""

    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    output_shapes: tuple[tuple[int, ...], ...]
    output_dtypes: tuple[mx.Dtype, ...]


class Kernel(Protocol):
    """One specialisation: a frozen, hashable value."""

    @property
    def place(self) -> str:
        """What it does and for which shapes and types: equal for all that could stand in for it."""

    @property
    def key(self) -> str:
        """`place` and the tuning knobs, if any; no two kernels of different text share it."""
        return self.place

    def text(self) -> KernelText:
        """The Metal source."""

    def launch(self, inputs: Sequence[mx.array]) -> Launch:
        """Threads and outputs for these inputs."""

    def trial(self, seed: int) -> list[mx.array]:
        """Inputs such as decoding has, with random contents."""

    def plain(self, inputs: Sequence[mx.array]) -> list[mx.array]:
        """The same in plain MLX: the fallback."""

    def exact(self, inputs: Sequence[mx.array]) -> list[Exact]:
        """The same in float64, as the equations say."""

    @property
    def tolerance(self) -> float:
        """Most that the error may be, relative to the norm of the exact outputs."""


def build(kernel: Kernel, factory: Factory | None = None) -> Run:
    """Prepare `kernel`; Metal compiles it when it is first evaluated.

    Args:
        kernel: the specialisation.
        factory: by default MLX's own.
    """
    make: Any = factory or mx.fast.metal_kernel
    made = make(*astuple(kernel.text()))

    def run(inputs: Sequence[mx.array]) -> list[mx.array]:
        launch = kernel.launch(inputs)
        outputs: list[mx.array] = made(
            inputs=list(inputs),
            grid=launch.grid,
            threadgroup=launch.threadgroup,
            output_shapes=launch.output_shapes,
            output_dtypes=launch.output_dtypes,
        )
        return outputs

    return run
