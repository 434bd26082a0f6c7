"""Which form of cache and which prefill step a run uses, so that it fits the memory there is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from apertus_mlx.backend.choose import uses_cpu
from apertus_mlx.backend.hardware import (
    available_bytes,
    card,
    device_name,
    has_gpu,
    physical_bytes,
)
from apertus_mlx.backend.ranks import joined
from apertus_mlx.cache import FULL_PRECISION
from apertus_mlx.checkpoint.inventory import Inventory
from apertus_mlx.errors import ResourceError, UsageError
from apertus_mlx.generation.options import RunOptions
from apertus_mlx.memory import Device, Fit, fit, footprint, parse_device
from apertus_mlx.memory.devices import published_bandwidth
from apertus_mlx.memory.fit import draft_bytes, prefill_steps
from apertus_mlx.memory.footprint import choose_backend
from apertus_mlx.model.disk_embedding import require_untied
from apertus_mlx.system.sizes import format_binary, format_bytes


def find_device(name: str | None) -> tuple[Device, bool, str | None]:
    """A device by name, else this machine; whether it has a GPU, and what its CPU path rounds to.

    Raises:
        UsageError: neither a known name nor a size.
    """
    if name is not None:  # every device by name is Apple's
        return parse_device(name), True, None
    precision = "auto" if uses_cpu("auto", None) else None
    own = card() if precision is None else None
    if own is None and has_gpu():
        # Its name and memory say which of Apple's table it is.
        chip, ram_bytes = device_name(), physical_bytes()
        name = f"this machine ({chip}, {format_binary(ram_bytes)})"
        speed = published_bandwidth(chip, ram_bytes)
        return Device(name, available_bytes(), speed, ram_bytes=ram_bytes), True, None
    if own is None:
        return Device("this machine", available_bytes()), False, precision
    name = f"this machine ({own.name}, {format_bytes(own.memory_bytes)})"
    device = Device(name, available_bytes(), ram_bytes=own.memory_bytes, is_card=True)
    return device, True, None


def memory_limit(options: RunOptions) -> int:
    """The bytes that a run may take: what was asked for, else what this machine can give."""
    asked = options.limit_bytes
    if asked is not None:
        return asked
    return available_bytes(has_gpu() and not uses_cpu(options.compute, options.dtype))


def plan_memory(
    inventory: Inventory, options: RunOptions, context: int, beside_bytes: int = 0
) -> Fit:
    """Settings with which `context` positions (the model's own, if fewer) fit `memory_limit`.

    `beside_bytes` of it are for something else, such as a draft. Of several ranks each has its part
    (see `own_part`) in memory, and all take the best settings that fit every one.

    Raises:
        ResourceError: nothing fits; the message has the numbers that would.
        UsageError: this model's heads cannot be cached as asked, its embedding not left on disk, or
            the ranks were given other settings.
    """
    ranks = joined()
    if ranks is None:
        return _plan_own(inventory, options, context, beside_bytes)
    plan = _plan_own(inventory, options, context, beside_bytes)
    numbers = f"{plan.backend} {options.dtype}".encode()
    ranks.require_alike({"type to compute in (--dtype sets it)": numbers})
    given = f"{options.form} {options.prefill_step} {options.force}".encode()
    ranks.require_alike({"set of options for the cache": given})
    try:
        return _plan_own(
            inventory, options, context, beside_bytes, lambda own: not ranks.any(not own)
        )
    except ResourceError:
        raise UsageError(
            "no settings for the cache suit all ranks; give --kv-bits and --prefill-step"
        ) from None


def _plan_own(
    inventory: Inventory,
    options: RunOptions,
    context: int,
    beside_bytes: int,
    agreed: Callable[[bool], bool] = bool,
) -> Fit:
    """See `plan_memory`; `agreed`: whether settings do for all, if for this machine or not."""
    config, form = inventory.config, options.form
    if form is not None:
        form.require_fit(config.head_dim)
    cpu = options.precision if uses_cpu(options.compute, options.dtype) else None
    on_disk = options.embedding == "disk"
    if on_disk:
        require_untied(inventory)
    backend = choose_backend(
        inventory, has_gpu(), options.dtype, cpu, card() is not None, embedding_on_disk=on_disk
    )
    context = min(context, config.max_position_embeddings)
    limit = max(0, memory_limit(options) - beside_bytes)
    if not options.force:
        return fit(inventory, limit, context, backend, form, options.prefill_step, agreed=agreed)
    form, step = form or FULL_PRECISION, options.prefill_step or prefill_steps(backend)[0]
    return Fit(form, step, footprint(inventory, form, context, step, backend), limit, backend)


def plan_draft(draft: Inventory, options: RunOptions, context: int) -> int:
    """The bytes that a draft takes beside its model; see `draft_bytes`."""
    cpu = options.precision if uses_cpu(options.compute, options.dtype) else None
    backend = choose_backend(draft, has_gpu(), options.dtype, cpu, card() is not None)
    return draft_bytes(draft, context, backend)


def describe_plan(plan: Fit, options: RunOptions, context: int) -> str | None:
    """One line about a plan that a limit has shaped; None about the usual one."""
    step = options.prefill_step or prefill_steps(plan.backend)[0]
    usual = (options.form or FULL_PRECISION, step)
    chosen = (plan.form, plan.prefill_step)
    if options.force or (options.memory_limit is None and chosen == usual):
        return None
    needed, limit = plan.footprint.total_bytes, plan.limit_bytes
    return (
        f"memory: about {format_bytes(needed)} of {format_bytes(limit)} "
        f"at {context} tokens, with the cache in {plan.form} and prefill steps of "
        f"{plan.prefill_step}"
    )


def report_plan(plan: Fit) -> dict[str, Any]:
    """What was chosen and what it is to take, in bytes."""
    return {
        "cache": str(plan.form),
        "prefill_step": plan.prefill_step,
        "limit_bytes": plan.limit_bytes,
        **plan.footprint.report(),
    }
