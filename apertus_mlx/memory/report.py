"""The planner's report as plain values: each form of cache on a device, and the best that fits."""

from __future__ import annotations

from typing import Any

from apertus_mlx.cache.config import CacheConfig
from apertus_mlx.checkpoint import layout
from apertus_mlx.checkpoint.inventory import Inventory
from apertus_mlx.errors import ResourceError, UsageError
from apertus_mlx.memory.devices import Device
from apertus_mlx.memory.fit import PREFILL_STEPS, fit, largest_context, possible_forms
from apertus_mlx.memory.footprint import (
    Backend,
    choose_backend,
    footprint,
    kv_bytes_per_position,
)
from apertus_mlx.memory.speed import FORMULA, decode_tokens_per_s
from apertus_mlx.system.sizes import format_bytes

DEFAULT_CONTEXT = 4096


def make_report(
    inventory: Inventory,
    device: Device,
    context: int | None,
    form: CacheConfig | None,
    prefill_step: int | None,
    on_gpu: bool,
    cpu: str | None = None,
) -> dict[str, Any]:
    """Everything `plan` shows.

    Raises:
        UsageError: a context beyond the model's, or heads that cannot be cached as asked.
    """
    longest = inventory.config.max_position_embeddings
    if context is not None and context > longest:
        raise UsageError(f"--context {context}: the model's context is {longest} tokens")
    context = min(DEFAULT_CONTEXT, longest) if context is None else context
    if form is not None:
        form.require_fit(inventory.config.head_dim)
    backend = choose_backend(inventory, on_gpu, cpu=cpu)
    forms = [form] if form is not None else possible_forms(inventory.config)
    step = prefill_step or PREFILL_STEPS[0]
    rows = [_row(inventory, device, context, one, step, backend) for one in forms]
    try:
        best = fit(
            inventory, device.memory_bytes, context, backend, form, prefill_step, bounds=True
        )
        best_row = _row(inventory, device, context, best.form, best.prefill_step, backend)
        advice = (
            f"best that fits: {_options(best.form)}--prefill-step {best.prefill_step} "
            f"(cache in {best.form}, "
            f"peak {format_bytes(best.footprint.total_bytes, round_up=True)})"
        )
    except ResourceError as error:
        best_row, advice = None, f"does not fit: {error}"
    return {
        "model": inventory.name,
        "parameters": layout.parameter_count(inventory.config),
        "file_bytes": inventory.checkpoint.file_bytes,
        "device": device.name,
        "limit_bytes": device.memory_bytes,
        "bandwidth_bytes_per_s": device.bandwidth,
        "context": context,
        "compute_bytes": backend.compute_bytes,
        "forms": rows,
        "best": best_row,
        "advice": advice,
        "speed_formula": FORMULA,
    }


def _row(
    inventory: Inventory,
    device: Device,
    context: int,
    form: CacheConfig,
    step: int,
    backend: Backend,
) -> dict[str, Any]:
    needed = footprint(inventory, form, context, step, backend)
    speed = None
    if device.bandwidth is not None:
        speed = decode_tokens_per_s(inventory, form, context, backend, device.bandwidth)
    return {
        "form": str(form),
        "prefill_step": step,
        "kv_bytes_per_token": kv_bytes_per_position(inventory.config, form, backend.compute_bytes),
        **needed.report(),
        "fits": needed.total_bytes <= device.memory_bytes,
        "largest_context": largest_context(inventory, device.memory_bytes, form, step, backend),
        "decode_tokens_per_s": speed,
    }


def _options(form: CacheConfig) -> str:
    options = f"--kv-bits {form.key_bits} " if form.quantized else ""
    return options + (f"--max-kv {form.bound} " if form.bound is not None else "")
