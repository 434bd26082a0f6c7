"""The bandwidth that is measured of a GPU, on simulated ones whose bandwidth is known."""

from __future__ import annotations

import pytest

from apertus_mlx.measure.bench.roofline import MOVED_BYTES, long_copies


class SimulatedGPU:
    """Starting an evaluation takes 60 us, each copy what the bandwidth says."""

    def __init__(self, bandwidth: float) -> None:
        self.bandwidth, self.now_s, self.copies = bandwidth, 0.0, 0

    def move(self, copies: int) -> None:
        self.copies = copies
        self.now_s += 60e-6 + copies * MOVED_BYTES / self.bandwidth

    def clock(self) -> float:
        return self.now_s


@pytest.mark.parametrize("bandwidth", [60e9, 546e9, 3.0e12, 4.8e12])
def test_starting_a_copy_does_not_count(bandwidth: float) -> None:
    gpu = SimulatedGPU(bandwidth)
    assert long_copies(gpu.move, gpu.clock) == pytest.approx(bandwidth, rel=0.01)
    assert gpu.now_s < 1.0


def test_a_clock_that_stands_still_ends() -> None:
    gpu = SimulatedGPU(1e30)
    times = iter(range(1000))
    assert long_copies(gpu.move, lambda: next(times) * 1e-9) > 0
    assert gpu.copies == 256
