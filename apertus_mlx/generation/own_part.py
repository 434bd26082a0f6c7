"""What of a model this machine holds, where several compute it."""

from __future__ import annotations

from apertus_mlx.backend.hardware import card, has_gpu
from apertus_mlx.backend.ranks import joined
from apertus_mlx.checkpoint.inventory import Inventory
from apertus_mlx.errors import UsageError
from apertus_mlx.generation.memory_plan import memory_limit
from apertus_mlx.generation.options import RunOptions
from apertus_mlx.memory.footprint import choose_backend
from apertus_mlx.memory.layers_by_memory import layers_by_memory
from apertus_mlx.model.split import part_of
from apertus_mlx.model.stages import stage_of


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
