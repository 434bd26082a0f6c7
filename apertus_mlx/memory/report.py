"""What a model takes on a device with each form of cache, and the best that fits."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from apertus_mlx.cache.config import CacheConfig
from apertus_mlx.checkpoint import layout
from apertus_mlx.checkpoint.inventory import Inventory
from apertus_mlx.errors import ResourceError, UsageError
from apertus_mlx.memory.devices import Device
from apertus_mlx.memory.fit import (
    draft_bytes,
    fit,
    largest_context,
    possible_forms,
    prefill_steps,
)
from apertus_mlx.memory.footprint import (
    Backend,
    choose_backend,
    disk_saving_bytes,
    footprint,
    kv_bytes_per_position,
)
from apertus_mlx.memory.speed import FORMULA, decode_tokens_per_s
from apertus_mlx.model.split import part_of
from apertus_mlx.system.sizes import format_bytes

DEFAULT_CONTEXT = 4096


@dataclass(frozen=True, slots=True)
class PlannedRun:
    """A run with one form of cache: bytes of each part where it is largest, and the peak.

    Attributes:
        form: bits and bounds of the cache, in words.
        largest_context: tokens with which it still fits; 0 if none do.
        decode_tokens_per_s: estimated; None where the memory's bandwidth is unknown.
    """

    form: str
    prefill_step: int
    kv_bytes_per_token: float
    weights_bytes: int
    kv_bytes: int
    prefill_bytes: int
    logits_bytes: int
    process_bytes: int
    loading_bytes: int
    total_bytes: int
    fits: bool
    largest_context: int
    decode_tokens_per_s: float | None


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """A model on a device.

    Attributes:
        limit_bytes: what the device gives one process.
        context: tokens of prompt and answer.
        compute_bytes: bytes of a number that is computed with.
        forms: a run with each form of cache, or with the one that was asked for.
        best: the best run that fits; None if none does.
        advice: its options, or why nothing fits and what would.
        embedding_on_disk_saves_bytes: what `--embedding disk` spares; 0 where it cannot.
        draft_bytes: what a draft takes of the limit.
        ranks: over how many machines the model is split; all bytes are of one of them.
    """

    model: str
    parameters: int
    file_bytes: int
    device: str
    limit_bytes: int
    bandwidth_bytes_per_s: float | None
    context: int
    compute_bytes: int
    forms: list[PlannedRun]
    best: PlannedRun | None
    advice: str
    speed_formula: str
    embedding_on_disk_saves_bytes: int
    draft_bytes: int = 0
    ranks: int = 1

    def as_json(self) -> dict[str, Any]:
        """What `plan --json` prints."""
        return asdict(self)


def plan_for_device(
    inventory: Inventory,
    device: Device,
    context: int | None,
    form: CacheConfig | None,
    prefill_step: int | None,
    on_gpu: bool,
    cpu: str | None = None,
    draft: Inventory | None = None,
    ranks: int = 1,
) -> MemoryPlan:
    """Plan for every form of cache, or for `form`; of several `ranks` for one.

    `draft` guesses and is in memory, too.

    Raises:
        UsageError: a context beyond the model's, heads that cannot be cached as asked, or a model
            that does not divide by `ranks`.
    """
    parameters = layout.parameter_count(inventory.config)
    inventory = part_of(inventory, ranks)
    longest = inventory.config.max_position_embeddings
    if context is not None and context > longest:
        raise UsageError(f"--context {context}: the model's context is {longest} tokens")
    context = min(DEFAULT_CONTEXT, longest) if context is None else context
    if form is not None:
        form.require_fit(inventory.config.head_dim)
    backend = choose_backend(inventory, on_gpu, cpu=cpu, is_card=device.is_card)
    forms = [form] if form is not None else possible_forms(inventory.config)
    beside = 0
    if draft is not None:
        beside = draft_bytes(
            draft, context, choose_backend(draft, on_gpu, cpu=cpu, is_card=device.is_card)
        )
    room = max(0, device.memory_bytes - beside)

    def planned(form: CacheConfig, step: int, backend: Backend) -> PlannedRun:
        needed = footprint(inventory, form, context, step, backend)
        speed = None
        if device.bandwidth is not None and ranks == 1:  # nobody knows the link
            speed = decode_tokens_per_s(inventory, form, context, backend, device.bandwidth)
        return PlannedRun(
            str(form),
            step,
            kv_bytes_per_position(inventory.config, form, backend.compute_bytes),
            **needed.report(),
            fits=needed.total_bytes <= room,
            largest_context=largest_context(inventory, room, form, step, backend),
            decode_tokens_per_s=speed,
        )

    try:
        spared = ""
        try:
            best = fit(inventory, room, context, backend, form, prefill_step, bounds=True)
        except ResourceError:
            if not disk_saving_bytes(inventory, backend):
                raise
            on_disk = replace(backend, embedding_on_disk=True)
            best = fit(inventory, room, context, on_disk, form, prefill_step, bounds=True)
            spared = "--embedding disk "
        best_row = planned(best.form, best.prefill_step, best.backend)
        advice = (
            f"best that fits: {spared}{_options(best.form)}--prefill-step {best.prefill_step} "
            f"(cache in {best.form}, "
            f"peak {format_bytes(best.footprint.total_bytes, round_up=True)})"
        )
    except ResourceError as error:
        best_row, advice = None, f"does not fit: {error}"
    return MemoryPlan(
        inventory.name,
        parameters,
        inventory.checkpoint.file_bytes,
        device.name,
        device.memory_bytes,
        device.bandwidth,
        context,
        backend.compute_bytes,
        [planned(each, prefill_step or prefill_steps(backend)[0], backend) for each in forms],
        best_row,
        advice,
        FORMULA,
        disk_saving_bytes(inventory, backend),
        beside,
        ranks,
    )


def _options(form: CacheConfig) -> str:
    options = f"--kv-bits {form.key_bits} " if form.quantized else ""
    return options + (f"--max-kv {form.bound} " if form.bound is not None else "")
