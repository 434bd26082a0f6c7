"""Chooses the form of the cache and the tokens per prefill step that fit a memory limit."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import product

from apertus_mlx.cache.config import FULL_BITS, STEP, CacheConfig
from apertus_mlx.checkpoint.config import ModelConfig
from apertus_mlx.checkpoint.inventory import Inventory
from apertus_mlx.errors import ResourceError, UsageError
from apertus_mlx.memory.footprint import Backend, Footprint, disk_saving_bytes, footprint
from apertus_mlx.quant.spec import QuantSpec
from apertus_mlx.system.sizes import format_bytes

# A draft reads prompts in steps of so many tokens.
DRAFT_STEP = 512
PREFILL_STEPS = (2048, 1024, 512, 256, 128, 64, 32)
# Steps down to this cost little speed; smaller ones are tried after the caches' precision.
COMFORTABLE_STEP = 128
# From the best quality to the least; 2 bits only on request.
FORMS = tuple(CacheConfig(bits, bits) for bits in (FULL_BITS, 8, 6, 4, 3))
LEAST_BOUND = 512
# MLX keeps freed buffers for the next operation; more than this brings nothing.
MAX_BUFFER_CACHE_BYTES = 512 * 10**6
MIN_BUFFER_CACHE_BYTES = 8 * 10**6


@dataclass(frozen=True, slots=True)
class Fit:
    """Settings that keep a run under a limit, and what it will take."""

    form: CacheConfig
    prefill_step: int
    footprint: Footprint
    limit_bytes: int
    backend: Backend

    @property
    def buffer_cache_bytes(self) -> int:
        """How many freed bytes MLX may keep: what the limit leaves, within reason."""
        if self.backend.cpu:
            return MIN_BUFFER_CACHE_BYTES
        left = self.limit_bytes - self.footprint.total_bytes
        return max(MIN_BUFFER_CACHE_BYTES, min(left, MAX_BUFFER_CACHE_BYTES))

    @property
    def wired_bytes(self) -> int:
        """What a GPU shall keep resident; none of it is MLX's where the CPU path computes."""
        return 0 if self.backend.cpu else self.footprint.total_bytes


def prefill_steps(backend: Backend) -> tuple[int, ...]:
    """The steps to choose from, the usual one first."""
    return tuple(step for step in PREFILL_STEPS if step <= backend.longest_step)


def fit(
    inventory: Inventory,
    limit_bytes: int,
    context: int,
    backend: Backend,
    form: CacheConfig | None = None,
    prefill_step: int | None = None,
    bounds: bool = False,
    agreed: Callable[[bool], bool] = bool,
) -> Fit:
    """The best settings with which `context` positions stay under `limit_bytes`.

    What is given (`form`, `prefill_step`) is kept, the rest chosen: full precision and long steps
    first. `bounds`: a bounded cache, which forgets, may be chosen when nothing else fits. `agreed`
    is asked of each in turn, with whether they fit here; it may refuse what others cannot do.

    Raises:
        ResourceError: nothing fits; the message has the numbers that would.
    """
    steps = (prefill_step,) if prefill_step is not None else prefill_steps(backend)
    for candidate, step in possible_settings(inventory.config, context, form, steps, bounds):
        needed = footprint(inventory, candidate, context, step, backend)
        if agreed(needed.total_bytes <= limit_bytes):
            return Fit(candidate, step, needed, limit_bytes, backend)
    raise ResourceError(_refusal(inventory, limit_bytes, context, backend, form, prefill_step))


def draft_bytes(draft: Inventory, context: int, backend: Backend) -> int:
    """What a draft takes beside its model: weights, and a cache of `context` or its own, if less.

    Libraries are there anyway.
    """
    context = min(context, draft.config.max_position_embeddings)
    needed = footprint(draft, FORMS[0], context, DRAFT_STEP, backend)
    return needed.total_bytes - needed.process_bytes


def largest_context(
    inventory: Inventory, limit_bytes: int, form: CacheConfig, prefill_step: int, backend: Backend
) -> int:
    """The longest context, up to the model's, that stays under `limit_bytes`; 0 if none does."""

    def total_bytes(context: int) -> int:
        return footprint(inventory, form, context, prefill_step, backend).total_bytes

    contexts = range(1, inventory.config.max_position_embeddings + 1)
    return bisect_right(contexts, limit_bytes, key=total_bytes)


def possible_settings(
    config: ModelConfig,
    context: int,
    form: CacheConfig | None,
    steps: Sequence[int],
    bounds: bool,
) -> Iterator[tuple[CacheConfig, int]]:
    """Forms of cache and prefill steps, the best first; see `fit`."""
    forms = [form] if form is not None else possible_forms(config)
    comfortable = [step for step in steps if step >= COMFORTABLE_STEP] or steps
    yield from product(forms, comfortable)
    yield from product(forms, steps)
    if bounds and form is None:
        bound = context // 2
        while bound >= LEAST_BOUND:
            yield from product([replace(forms[-1], bound=bound)], steps)
            bound //= 2


def possible_forms(config: ModelConfig) -> list[CacheConfig]:
    """The forms that this model's heads allow, best first."""
    forms = []
    for form in FORMS:
        with suppress(UsageError):
            form.require_fit(config.head_dim)
            forms.append(form)
    return forms


def _refusal(
    inventory: Inventory,
    limit_bytes: int,
    context: int,
    backend: Backend,
    form: CacheConfig | None,
    prefill_step: int | None,
) -> str:
    smallest, least_step = possible_forms(inventory.config)[-1], PREFILL_STEPS[-1]
    wanted, step = form or smallest, prefill_step or least_step
    needed = footprint(inventory, wanted, context, step, backend)
    process = ""
    if needed.process_bytes:
        process = f"libraries and tokenizer {_needed(needed.process_bytes)}, "
    message = (
        f"{inventory.name}: {context} tokens of context need {_needed(needed.total_bytes)} "
        f"({process}weights {_needed(needed.weights_bytes)}, cache "
        f"{_needed(needed.kv_bytes)} at {wanted}, working memory "
        f"{_needed(needed.prefill_bytes)} at --prefill-step {step}), "
        f"the limit is {_needed(limit_bytes)}; "
    )
    if disk_saving_bytes(inventory, backend) and not backend.embedding_on_disk:
        on_disk = replace(backend, embedding_on_disk=True)
        with suppress(ResourceError):
            least = fit(inventory, limit_bytes, context, on_disk, form, prefill_step)
            return message + (
                f"what would fit: --embedding disk, {_needed(least.footprint.total_bytes)}; "
                "--force tries anyway"
            )
    fits = largest_context(inventory, limit_bytes, smallest, least_step, backend)
    if fits >= LEAST_BOUND:
        bits = "" if smallest.key_bits == FULL_BITS else f"--kv-bits {smallest.key_bits} "
        bound = _largest_bound(inventory, limit_bytes, context, smallest, backend)
        ring = f"with --max-kv {bound}, or " if bound else ""
        return message + (
            f"what would fit: {bits}--prefill-step {least_step} {ring}"
            f"with at most {fits} tokens in all; --force tries anyway"
        )
    short = min(context, LEAST_BOUND)
    steps = (prefill_step,) if prefill_step is not None else prefill_steps(backend)
    found = possible_settings(inventory.config, short, form, steps, False)
    settings = [(each, short, step) for each, step in found]

    def least_of(model: Inventory) -> int:
        return min(footprint(model, *each, backend).total_bytes for each in settings)

    least_bytes = least_of(inventory)
    for width in (4, 3, 2):
        other_bytes = least_of(_at_width(inventory, width))
        # A width that this path keeps as it keeps the present one would help nobody.
        if other_bytes < least_bytes and other_bytes <= limit_bytes:
            return message + (
                f"what would fit: the model at {width} bits ({short} tokens from "
                f"{_needed(other_bytes)} on), apertus-mlx convert --bits {width} of its original"
            )
    return message + (f"{short} tokens run from {_needed(least_bytes)} on; take a smaller model")


def _largest_bound(
    inventory: Inventory, limit_bytes: int, context: int, form: CacheConfig, backend: Backend
) -> int:
    """The longest ring that stays under the limit, in steps of 32 positions; 0 if none does."""

    def total_bytes(bound: int) -> int:
        bounded = replace(form, bound=max(bound, form.least_bound))
        return footprint(inventory, bounded, context, PREFILL_STEPS[-1], backend).total_bytes

    bounds = range(STEP, context + 1, STEP)
    fitting = bisect_right(bounds, limit_bytes, key=total_bytes)
    return max(bounds[fitting - 1], form.least_bound) if fitting else 0


def _at_width(inventory: Inventory, bits: int) -> Inventory:
    """The model as it would be with all matrices in `bits` whose columns divide into groups."""
    spec = QuantSpec(bits, 64)
    matrices = {
        path: replace(matrix, spec=spec if spec.fits(matrix.columns) else None)
        for path, matrix in inventory.matrices.items()
    }
    return replace(inventory, matrices=matrices)


def _needed(size_bytes: int) -> str:
    return format_bytes(size_bytes, round_up=True)
