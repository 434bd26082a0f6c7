"""What of a model this machine holds, where several compute it."""

from __future__ import annotations

from dataclasses import replace

from apertus_mlx.backend.hardware import card, has_gpu
from apertus_mlx.backend.ranks import joined
from apertus_mlx.checkpoint.inventory import Inventory
from apertus_mlx.errors import UsageError
from apertus_mlx.generation.memory_plan import memory_limit
from apertus_mlx.generation.options import RunOptions
from apertus_mlx.memory import Fit
from apertus_mlx.memory.footprint import choose_backend, kv_bytes_per_position
from apertus_mlx.memory.layers_by_memory import layers_by_memory
from apertus_mlx.model.split import part_of
from apertus_mlx.model.stages import stage_of

_MOST_POSITIONS = 2**31


def common_room(inventory: Inventory, plan: Fit) -> Fit:
    """`plan` with the limit at which the caches of all ranks hold as many positions as any can."""
    ranks = joined()
    if ranks is None:
        return plan
    each = kv_bytes_per_position(inventory.config, plan.form, plan.backend.compute_bytes)
    taken = plan.footprint.total_bytes
    own = max(0, plan.limit_bytes - taken) / each
    positions = min(ranks.gathered(int(min(own, _MOST_POSITIONS))))
    return replace(plan, limit_bytes=taken + int(positions * each))


def own_part(inventory: Inventory, options: RunOptions) -> Inventory:
    """This rank's part of `inventory`, or all of it where this process computes alone.

    With `options.pipeline` every rank tells how much memory it has, and all find the same split.

    Raises:
        UsageError: the model does not divide by the ranks, or `pipeline` without ranks.
    """
    ranks = joined()
    if ranks is None:
        if options.pipeline:
            raise UsageError("--pipeline: splits a model over the machines of mlx.launch")
        return inventory
    ranks.require_alike({"choice of --pipeline": str(options.pipeline).encode()})
    if not options.pipeline:
        return part_of(inventory, ranks.size, ranks.rank)
    backend = choose_backend(inventory, has_gpu(), options.dtype, is_card=card() is not None)
    ranks.require_alike({"type to compute in (--dtype sets it)": str(backend).encode()})
    if options.form is not None:
        options.form.require_fit(inventory.config.head_dim)
    limits = [megabytes * 10**6 for megabytes in ranks.gathered(memory_limit(options) // 10**6)]
    split = layers_by_memory(inventory, limits, backend, options.form, options.prefill_step)
    return stage_of(inventory, split[ranks.rank], ranks.rank, ranks.size)
