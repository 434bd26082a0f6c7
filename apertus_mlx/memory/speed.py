"""How fast a device would decode: an estimate from bytes a token and bandwidth."""

from __future__ import annotations

from apertus_mlx.cache.config import CacheConfig
from apertus_mlx.checkpoint import layout
from apertus_mlx.checkpoint.inventory import Inventory
from apertus_mlx.memory.footprint import Backend, kv_bytes_per_position, weights_bytes

# MLX reaches 83 % (iPhone 17 Pro) to 94 % (M4 Max) of the bandwidth in published measurements.
BANDWIDTH_SHARE = 0.85
# Of the graph without fused kernels; a test counts them.
DISPATCHES_PER_LAYER, DISPATCHES_PER_TOKEN, DISPATCH_S = 16, 4, 3e-6
FORMULA = (
    f"tokens/s = 1 / ((weights read + cache read) / ({BANDWIDTH_SHARE} * bandwidth) "
    f"+ ({DISPATCHES_PER_LAYER} * layers + {DISPATCHES_PER_TOKEN}) * {DISPATCH_S * 1e6:g} us); "
    "an estimate, +-25 %"
)


def decode_tokens_per_s(
    inventory: Inventory, form: CacheConfig, context: int, backend: Backend, bandwidth: float
) -> float:
    """Estimated tokens per second at `context` positions, by `FORMULA`."""
    seen = context if form.bound is None else min(context, form.bound)
    cache = kv_bytes_per_position(inventory.config, form, backend.compute_bytes) * seen
    read = weights_bytes(inventory, backend.compute_bytes) + cache
    if not inventory.config.tie_word_embeddings:  # of an untied embedding it reads one row
        read -= inventory.matrices[layout.EMBEDDING].weight_bytes(backend.compute_bytes)
    layers = inventory.config.num_hidden_layers
    overhead_s = (DISPATCHES_PER_LAYER * layers + DISPATCHES_PER_TOKEN) * DISPATCH_S
    return 1 / (read / (BANDWIDTH_SHARE * bandwidth) + overhead_s)
