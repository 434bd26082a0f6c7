"""Which layers each of several machines gets, so that the fullest is as little full as can be."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from apertus_mlx.cache import FULL_PRECISION
from apertus_mlx.cache.config import CacheConfig
from apertus_mlx.checkpoint import layout
from apertus_mlx.checkpoint.inventory import Inventory
from apertus_mlx.errors import UsageError
from apertus_mlx.memory.fit import prefill_steps
from apertus_mlx.memory.footprint import Backend, footprint
from apertus_mlx.model.stages import stage_of

# Positions that the caches of a layer are reckoned with.
CONTEXT = 8192
# How closely the fill of the fullest machine is found: so often its range is halved.
_HALVINGS = 64


def layers_by_memory(
    inventory: Inventory,
    limits_bytes: Sequence[int],
    backend: Backend,
    form: CacheConfig | None = None,
    prefill_step: int | None = None,
) -> list[range]:
    """The layers of each rank, which may take `limits_bytes` of it.

    The fullest rank, by the share of its limit, is as little full as can be. Every rank has a
    layer, whether it has room for it or not. Where `form` and `prefill_step` are left to be chosen,
    it is reckoned with the best ones.

    Raises:
        UsageError: there are fewer layers than ranks.
    """
    form, prefill_step = form or FULL_PRECISION, prefill_step or prefill_steps(backend)[0]
    context = min(CONTEXT, inventory.config.max_position_embeddings)
    ranks, count = len(limits_bytes), inventory.config.num_hidden_layers
    if ranks > count:
        raise UsageError(f"{inventory.name}: {ranks} ranks: there are but {count} layers to split")
    own = [0] * count
    for path, matrix in inventory.matrices.items():
        number = layout.layer_of(path)
        if number is not None:
            own[number] += matrix.weight_bytes(backend.compute_bytes)

    def least_bytes(rank: int, layers: int) -> int:
        """All that rank takes beside its layers' matrices."""
        part = stage_of(inventory, range(layers), rank, ranks)
        total = footprint(part, form, context, prefill_step, backend).total_bytes
        return total - sum(own[:layers])

    beside, each = [], []
    for rank in range(ranks):
        one = least_bytes(rank, 1)
        each.append(least_bytes(rank, 2) - one if count > 1 else 0)
        beside.append(one - each[-1])

    def ends_at(fill: float) -> list[int] | None:
        """Behind which layers the ranks end if none is fuller; None: then too few are placed."""
        ends = [0]
        for rank, limit in enumerate(limits_bytes):
            end, room = ends[-1], fill * max(limit, 1) - beside[rank]
            most = count - (ranks - 1 - rank)
            while end < most and room >= own[end] + each[rank]:
                room -= own[end] + each[rank]
                end += 1
            if end == ends[-1]:
                return None
            ends.append(end)
        return ends if ends[-1] == count else None

    # Enough even if one rank had all layers, or each but one.
    most = float(sum(own) + max(beside) + count * max(each) + 1) / max(min(limits_bytes), 1)
    least, found = 0.0, ends_at(most)
    for _ in range(_HALVINGS):
        middle = (least + most) / 2
        if (ends := ends_at(middle)) is None:
            least = middle
        else:
            most, found = middle, ends
    assert found is not None
    return [range(start, end) for start, end in pairwise(found)]
