"""One model on every device, or every model on one device: a row for each."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from apertus_mlx.cache.config import CacheConfig
from apertus_mlx.checkpoint.inventory import Inventory
from apertus_mlx.errors import ResourceError
from apertus_mlx.memory.devices import Device
from apertus_mlx.memory.fit import PREFILL_STEPS, fit, largest_context, possible_forms
from apertus_mlx.memory.footprint import Backend, footprint
from apertus_mlx.memory.report import DEFAULT_CONTEXT
from apertus_mlx.memory.speed import FORMULA, decode_tokens_per_s
from apertus_mlx.model.split import part_of


@dataclass(frozen=True, slots=True)
class PlanRow:
    """A model on a device, with the best settings that fit or, if none do, the most frugal.

    Attributes:
        is_estimate: whether the model's sizes have been computed, not read from its files.
        form: bits and bounds of the cache, in words.
        total_bytes: the peak of the run.
        largest_context: tokens with which these settings still fit; 0 if none do.
        decode_tokens_per_s: estimated; None where nothing fits or the bandwidth is unknown.
    """

    model: str
    is_estimate: bool
    device: Device
    context: int
    weights_bytes: int
    form: str
    prefill_step: int
    total_bytes: int
    fits: bool
    largest_context: int
    decode_tokens_per_s: float | None


@dataclass(frozen=True, slots=True)
class Overview:
    """All rows, and how their speeds were estimated."""

    rows: list[PlanRow]
    speed_formula: str = FORMULA

    def as_json(self) -> dict[str, Any]:
        """What `plan --all` and `plan --device all` print with `--json`."""
        return asdict(self)


def plan_row(
    inventory: Inventory,
    device: Device,
    context: int | None,
    form: CacheConfig | None,
    prefill_step: int | None,
    backend: Backend,
    is_estimate: bool = False,
    ranks: int = 1,
) -> PlanRow:
    """Plan for `context` tokens, or for the model's own context where that is shorter.

    Of several `ranks` it is for one, without a speed.

    Raises:
        UsageError: heads that cannot be cached as asked, or a model that does not divide by
            `ranks`.
    """
    inventory = part_of(inventory, ranks)
    context = min(context or DEFAULT_CONTEXT, inventory.config.max_position_embeddings)
    if form is not None:
        form.require_fit(inventory.config.head_dim)
    limit = device.memory_bytes
    try:
        found = fit(inventory, limit, context, backend, form, prefill_step, bounds=True)
        form, step, needed, fits = found.form, found.prefill_step, found.footprint, True
    except ResourceError:
        form, step = form or possible_forms(inventory.config)[-1], prefill_step or PREFILL_STEPS[-1]
        needed, fits = footprint(inventory, form, context, step, backend), False
    speed = None
    if fits and device.bandwidth is not None and ranks == 1:
        speed = decode_tokens_per_s(inventory, form, context, backend, device.bandwidth)
    longest = largest_context(inventory, limit, form, step, backend)
    return PlanRow(
        inventory.name,
        is_estimate,
        device,
        context,
        needed.weights_bytes,
        str(form),
        step,
        needed.total_bytes,
        fits,
        longest,
        speed,
    )
