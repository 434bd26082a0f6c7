"""Options about keys, values and memory that several commands share, and what follows from them."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apertus_mlx.cli.output import note
from apertus_mlx.system.sizes import format_bytes

if TYPE_CHECKING:
    from apertus_mlx.cache.config import CacheConfig
    from apertus_mlx.checkpoint.inventory import Inventory
    from apertus_mlx.generation.prompt_cache import PromptCache
    from apertus_mlx.memory import Fit

KvBitsOption = Annotated[
    int | None,
    typer.Option("--kv-bits", help="Bits of cached keys and values: 2, 3, 4, 6, 8 or 16 (full)."),
]
KvBitsVOption = Annotated[
    int | None, typer.Option("--kv-bits-v", help="Bits of cached values; default: those of keys.")
]
MaxKvOption = Annotated[
    int | None,
    typer.Option("--max-kv", help="Keep at most this many positions: the first few, the latest."),
]
KvSinkOption = Annotated[
    int | None, typer.Option("--kv-sink", help="First positions that always stay; default: 4.")
]
KvRotateOption = Annotated[
    bool | None,
    typer.Option(
        "--kv-rotate/--no-kv-rotate",
        help="Rotate keys before they are quantized; default: where heads allow it.",
    ),
]
PrefillStepOption = Annotated[
    int | None,
    typer.Option(
        "--prefill-step", min=1, max=2**20, help="Prompt tokens per step; default: 512, or less."
    ),
]
MemoryLimitOption = Annotated[
    str | None,
    typer.Option(
        "--memory-limit", help="Stay below this, as 1.2GB; default: what the machine can give."
    ),
]
ForceOption = Annotated[
    bool, typer.Option("--force", help="Try even where the memory will not suffice.")
]
PromptCacheOption = Annotated[
    Path | None,
    typer.Option(
        "--prompt-cache", help="Resume the prompt from this file; it is made if not there."
    ),
]


class MemoryGuard:
    """Chooses settings before weights are read; sets MLX's limits, and restores them at the end.

    `fit` is there once `choose` has been called.
    """

    def __init__(
        self, request: MemoryRequest, dtype: str | None, compute: str, precision: str
    ) -> None:
        self._request = request
        self._dtype = dtype
        self._compute = compute
        self._precision = precision
        self._limits = contextlib.ExitStack()
        self.fit: Fit

    def __enter__(self) -> MemoryGuard:
        return self

    def __exit__(self, *_: object) -> None:
        self._limits.close()

    def choose(self, inventory: Inventory, context: int) -> None:
        """See `choose_settings`."""
        from apertus_mlx.backend.memory_limits import mlx_limits

        self.fit = choose_settings(
            self._request, inventory, context, self._dtype, self._compute, self._precision
        )
        self._limits.enter_context(mlx_limits(self.fit.buffer_cache_bytes, self.fit.wired_bytes))


@dataclass(frozen=True, slots=True)
class MemoryRequest:
    """What the user asked for; None is for the planner to choose."""

    form: CacheConfig | None
    prefill_step: int | None
    limit_bytes: int | None
    force: bool


def read_cache_form(
    kv_bits: int | None,
    kv_bits_v: int | None,
    max_kv: int | None,
    kv_sink: int | None,
    kv_rotate: bool | None,
) -> CacheConfig | None:
    """The form of cache that the options describe; None if none of them was given.

    Raises:
        UsageError: a value outside its range.
    """
    from apertus_mlx.cache.config import read_cache_form

    return read_cache_form(kv_bits, kv_bits_v, max_kv, kv_sink, kv_rotate)


def read_memory_request(
    form: CacheConfig | None, prefill_step: int | None, memory_limit: str | None, force: bool
) -> MemoryRequest:
    """Put the options together.

    Raises:
        UsageError: `memory_limit` is no size.
    """
    from apertus_mlx.memory import parse_size

    limit = None if memory_limit is None else parse_size(memory_limit, "--memory-limit")
    return MemoryRequest(form, prefill_step, limit, force)


def choose_settings(
    request: MemoryRequest,
    inventory: Inventory,
    context: int,
    dtype: str | None,
    compute: str,
    precision: str = "auto",
) -> Fit:
    """Settings with which `context` positions fit the limit or this machine; says what it chose.

    Raises:
        ResourceError: nothing fits; the message has the numbers that would.
        UsageError: this model's heads cannot be cached as asked.
    """
    from apertus_mlx.backend.choose import uses_cpu
    from apertus_mlx.backend.hardware import available_bytes, has_gpu
    from apertus_mlx.cache import FULL_PRECISION
    from apertus_mlx.memory import Fit, fit, footprint
    from apertus_mlx.memory.fit import PREFILL_STEPS
    from apertus_mlx.memory.footprint import choose_backend
    from apertus_mlx.memory.subject import inventory_subject

    config = inventory.config
    if request.form is not None:
        request.form.require_fit(config.head_dim)
    subject = inventory_subject(inventory, str(inventory.checkpoint.directory))
    cpu = precision if uses_cpu(compute, dtype) else None
    backend = choose_backend(subject, has_gpu(), dtype, cpu)
    context = min(context, config.max_position_embeddings)
    limit = request.limit_bytes
    if limit is None:
        limit = available_bytes(has_gpu() and cpu is None)
    if request.force:
        form = request.form or FULL_PRECISION
        step = request.prefill_step or PREFILL_STEPS[0]
        return Fit(form, step, footprint(subject, form, context, step, backend), limit, backend)
    found = fit(subject, limit, context, backend, request.form, request.prefill_step)
    usual = (request.form or FULL_PRECISION, request.prefill_step or PREFILL_STEPS[0])
    if request.limit_bytes is not None or (found.form, found.prefill_step) != usual:
        note(
            f"memory: about {format_bytes(found.footprint.total_bytes)} of {format_bytes(limit)} "
            f"at {context} tokens, with the cache in {found.form} and prefill steps of "
            f"{found.prefill_step}"
        )
    return found


def open_prompt_cache(
    path: Path, inventory: Inventory, form: CacheConfig, dtype: str | None, compute: str
) -> PromptCache:
    """The prompt cache at `path`, checked before any weight is read.

    Raises:
        RejectedError: it is damaged, or made under other conditions.
    """
    from apertus_mlx.backend.choose import uses_cpu
    from apertus_mlx.backend.mlx import DTYPES, compute_dtype
    from apertus_mlx.generation.prompt_cache import PromptCache

    if uses_cpu(compute, dtype):
        dtype = "float32"
    number = DTYPES[dtype] if dtype else compute_dtype(inventory)
    return PromptCache(path, inventory, form, number)


def report_fit(fit: Fit) -> dict[str, Any]:
    """What was chosen and what it was to take, for `--json`."""
    return {
        "cache": str(fit.form),
        "prefill_step": fit.prefill_step,
        "limit_bytes": fit.limit_bytes,
        **fit.footprint.report(),
    }
