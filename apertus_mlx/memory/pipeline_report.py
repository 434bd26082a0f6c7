"""What each of several machines takes of a model that is split over them by layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from apertus_mlx.cache.config import CacheConfig
from apertus_mlx.checkpoint.inventory import Inventory
from apertus_mlx.errors import UsageError
from apertus_mlx.memory.devices import Device
from apertus_mlx.memory.fit import possible_settings, prefill_steps
from apertus_mlx.memory.footprint import Footprint, choose_backend, footprint
from apertus_mlx.memory.layers_by_memory import layers_by_memory
from apertus_mlx.memory.report import DEFAULT_CONTEXT
from apertus_mlx.model.stages import stage_of
from apertus_mlx.system.sizes import counted


@dataclass(frozen=True, slots=True)
class PlannedStage:
    """One machine.

    Attributes:
        limit_bytes: what the device gives one process.
        first_layer: its first layer, from 0 on.
        layers: how many it has.
        total_bytes: the most at once.
    """

    device: str
    limit_bytes: int
    first_layer: int
    layers: int
    weights_bytes: int
    kv_bytes: int
    prefill_bytes: int
    logits_bytes: int
    total_bytes: int
    fits: bool


@dataclass(frozen=True, slots=True)
class PipelinePlan:
    """A model on several machines.

    Attributes:
        layers: of the whole model.
        context: tokens of prompt and answer.
        form: bits and bounds of the cache, in words: the best with which all fit.
        stages: the machines, rank 0 first.
        advice: the options of a run, or that it does not fit.
    """

    model: str
    layers: int
    context: int
    form: str
    prefill_step: int
    stages: list[PlannedStage]
    fits: bool
    advice: str

    def as_json(self) -> dict[str, Any]:
        """What `plan --pipeline --json` prints."""
        return asdict(self)


def plan_stages(
    inventory: Inventory,
    devices: Sequence[Device],
    context: int | None,
    form: CacheConfig | None,
    prefill_step: int | None,
    on_gpu: bool,
) -> PipelinePlan:
    """Split by memory, then find the best settings that fit all; the most frugal if none do.

    Raises:
        UsageError: a context beyond the model's, heads that cannot be cached as asked, or more
            devices than layers.
    """
    config, ranks = inventory.config, len(devices)
    longest = config.max_position_embeddings
    if context is not None and context > longest:
        raise UsageError(f"--context {context}: the model's context is {longest} tokens")
    context = min(DEFAULT_CONTEXT, longest) if context is None else context
    if form is not None:
        form.require_fit(config.head_dim)
    backend = choose_backend(inventory, on_gpu, is_card=any(each.is_card for each in devices))
    limits = [each.memory_bytes for each in devices]
    split = layers_by_memory(inventory, limits, backend, form, prefill_step)
    parts = [stage_of(inventory, layers, rank, ranks) for rank, layers in enumerate(split)]
    steps = (prefill_step,) if prefill_step is not None else prefill_steps(backend)
    needed: list[Footprint] = []
    fits = False
    for chosen, step in possible_settings(config, context, form, steps, bounds=False):
        needed = [footprint(part, chosen, context, step, backend) for part in parts]
        fits = all(each.total_bytes <= limit for each, limit in zip(needed, limits, strict=True))
        if fits:
            break
    stages = [
        PlannedStage(
            device.name,
            device.memory_bytes,
            layers.start,
            len(layers),
            each.weights_bytes,
            each.kv_bytes,
            each.prefill_bytes,
            each.logits_bytes,
            each.total_bytes,
            each.total_bytes <= device.memory_bytes,
        )
        for device, layers, each in zip(devices, split, needed, strict=True)
    ]
    if fits:
        bits = f" --kv-bits {chosen.key_bits}" if chosen.quantized else ""
        advice = f"fits: mlx.launch ... --pipeline{bits} --prefill-step {step}"
    else:
        full = sum(not stage.fits for stage in stages)
        advice = (
            f"does not fit: {counted(full, 'machine')} of {ranks} would be too full even with a "
            f"cache in {chosen}"
        )
    return PipelinePlan(
        inventory.name, config.num_hidden_layers, context, str(chosen), step, stages, fits, advice
    )
