"""The doctor's own device, MLX in this process, with a step that is compiled and one that is not.

Kernels are stood in for by their plain forms, which `mx.compile` can trace on any machine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mlx.core as mx
import pytest

from apertus_mlx.backend.metal.fused import FusedStep
from apertus_mlx.backend.metal.kernel import Kernel
from apertus_mlx.backend.metal.needed import kernels_for
from apertus_mlx.checkpoint.inventory import Inventory, take_inventory
from apertus_mlx.measure.doctor import mlx_device
from apertus_mlx.measure.doctor.mlx_device import GREEDY_TOKENS, TIMED_TOKENS, MLXDevice
from apertus_mlx.model.apertus import Model
from tests.builders import config_4x, random_weights, write_checkpoint

pytestmark = pytest.mark.usefixtures("compiling")


@pytest.fixture(scope="module")
def inventory(tmp_path_factory: pytest.TempPathFactory) -> Inventory:
    """A model of two layers with 4-bit weights."""
    config = config_4x(num_hidden_layers=2, quantization={"group_size": 32, "bits": 4})
    weights: dict[str, Any] = dict(random_weights(config_4x(num_hidden_layers=2)))
    for name in [name for name, weight in weights.items() if weight.ndim == 2]:
        path = name.removesuffix(".weight")
        parts = mx.quantize(mx.array(weights[name]), group_size=32, bits=4)
        weights.update(zip((name, f"{path}.scales", f"{path}.biases"), parts, strict=True))
    return take_inventory(write_checkpoint(tmp_path_factory.mktemp("tiny"), config, weights))


@pytest.fixture(scope="module")
def kernels(inventory: Inventory) -> Mapping[str, Kernel]:
    found = kernels_for(inventory.config, inventory.specs, mx.float32)
    return {kernel.place: kernel for kernel in reversed(found)}


def plain_forms(kernels: Mapping[str, Kernel]) -> Any:
    """A factory whose kernels are the plain forms."""
    by_name = {kernel.text().name: kernel for kernel in kernels.values()}

    def make(name: str, *_: Any) -> Callable[..., list[mx.array]]:
        def launch(inputs: Sequence[mx.array], **_: Any) -> list[mx.array]:
            return by_name[name].plain(inputs)

        return launch

    return make


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many ids each description of a step to MLX had; a replayed step is not described."""
    described: list[int] = []
    eager = FusedStep.__call__

    def described_step(step: FusedStep, model: Model, token: mx.array, cache: Any) -> Any:
        described.append(token.size)
        return eager(step, model, token, cache)

    monkeypatch.setattr(FusedStep, "__call__", described_step)
    return described


def test_only_a_compiled_step_is_described_once(
    inventory: Inventory, kernels: Mapping[str, Kernel], steps: list[int]
) -> None:
    device = MLXDevice(inventory, "float32", plain_forms(kernels))
    for compiled, descriptions in ((False, TIMED_TOKENS), (True, 1), (False, TIMED_TOKENS)):
        steps.clear()
        device.step_seconds(kernels, compiled)
        assert steps.count(1) == descriptions


def test_the_description_does_not_count_as_time(
    inventory: Inventory,
    kernels: Mapping[str, Kernel],
    steps: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    readings: list[int] = []

    class Clock:
        @staticmethod
        def perf_counter() -> float:
            """Reads how many steps have been described."""
            readings.append(steps.count(1))
            return float(readings[-1])

    monkeypatch.setattr(mlx_device, "time", Clock)
    device = MLXDevice(inventory, "float32", plain_forms(kernels))
    assert device.step_seconds(kernels, compiled=True) == 0
    assert readings == [1, 1]
    assert device.step_seconds(kernels) == pytest.approx((TIMED_TOKENS - 1) / TIMED_TOKENS)


def test_a_compiled_step_gives_the_tokens_of_plain_mlx(
    inventory: Inventory, kernels: Mapping[str, Kernel], steps: list[int]
) -> None:
    device = MLXDevice(inventory, "float32", plain_forms(kernels))
    for compiled in (False, True):
        found = device.agreement(kernels, compiled)
        assert found.same == found.tokens == GREEDY_TOKENS
        assert found.error < 1e-5
    assert steps.count(1) == GREEDY_TOKENS + 1
