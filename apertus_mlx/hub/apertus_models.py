"""The released Apertus models, and those in the Hub's cache on this machine.

Imports nothing heavy: `huggingface_hub` is imported inside the functions that need it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from apertus_mlx.checkpoint import layout
from apertus_mlx.checkpoint.config import CONFIG_FILE, MODEL_TYPES, parse_config
from apertus_mlx.checkpoint.inventory import Inventory, StoredMatrix
from apertus_mlx.checkpoint.tensors import Checkpoint
from apertus_mlx.errors import NotFoundError, RejectedError, UsageError
from apertus_mlx.hub.listing import check_request
from apertus_mlx.hub.snapshot import is_complete
from apertus_mlx.system.strict_json import read_object

_COMMON = {
    "model_type": "apertus", "hidden_act": "xielu", "attention_bias": False, "mlp_bias": False,
    "qk_norm": True, "post_norm": False, "rms_norm_eps": 1e-5, "vocab_size": 131072,
    "bos_token_id": 1, "eos_token_id": 2, "rope_theta": 500000, "torch_dtype": "bfloat16",
}  # fmt: skip
# Layers, width, width between, heads, heads of keys and values, context.
_SIZES = {
    "0.5B": (20, 1024, 6144, 16, 4, 4096),
    "1.5B": (16, 2048, 12288, 32, 8, 4096),
    "4B": (24, 3072, 16384, 24, 8, 4096),
    "8B": (32, 4096, 21504, 32, 8, 65536),
    "70B": (80, 8192, 43008, 64, 8, 65536),
}
# Of all released models.
RELEASED_TOKENIZER_BYTES = 17_078_480
# Of the MLX formats: the embedding and the head have 6 bits, where the others have fewer.
_EDGE_BITS = 6
# Repository id -> size, and bits of the MLX format; None for plain bfloat16.
RELEASED: Mapping[str, tuple[str, int | None]] = MappingProxyType(
    {
        **{
            f"swiss-ai/Apertus-v1.1-{size}-Instruct{form}": (size, bits)
            for size in ("0.5B", "1.5B", "4B")
            for form, bits in (("", None), *((f"-MLX-INT{bits}", bits) for bits in (3, 4, 6)))
        },
        "swiss-ai/Apertus-8B-2509": ("8B", None),
        "swiss-ai/Apertus-8B-Instruct-2509": ("8B", None),
        "swiss-ai/Apertus-70B-Instruct-2509": ("70B", None),
    }
)


@dataclass(frozen=True, slots=True)
class CachedModel:
    """An Apertus model in the Hub's cache.

    Attributes:
        repo_id: the repository.
        size_bytes: what it takes on the disk, all commits together.
        commits: all that are there.
        directory: the folder of the newest complete one; None where a download is unfinished.
    """

    repo_id: str
    size_bytes: int
    commits: tuple[str, ...]
    directory: Path | None


def expected_inventory(repo_id: str) -> Inventory:
    """What a released model holds, from its size and format: no tensors, only the matrices.

    For the MLX formats an estimate, with groups of 64 weights and 16-bit scales.
    """
    size, bits = RELEASED[repo_id]
    layers, hidden, between, heads, kv_heads, context = _SIZES[size]
    values: dict[str, Any] = {
        **_COMMON,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": between,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": context,
        "tie_word_embeddings": size == "0.5B",
    }
    if bits is not None:
        edges = {"bits": max(bits, _EDGE_BITS), "group_size": 64}
        values["quantization"] = {
            "bits": bits, "group_size": 64, layout.EMBEDDING: edges, layout.HEAD: edges,
        }  # fmt: skip
    config = parse_config(values, repo_id)
    matrices = {
        matrix.path: StoredMatrix(
            matrix.path,
            matrix.rows,
            matrix.columns,
            config.quantization.spec_for(matrix.path) if config.quantization else None,
            (),
        )
        for matrix in layout.matrices(config)
    }
    return Inventory(config, Checkpoint(repo_id, (), {}, None), matrices, {}, {})


def expected_download_bytes(repo_id: str) -> int:
    """Bytes to download of a released model, nearly: weights and tokenizer."""
    inventory = expected_inventory(repo_id)
    config = inventory.config
    stored = sum(matrix.weight_bytes(2) for matrix in inventory.matrices.values())
    stored += 2 * sum(math.prod(shape) for _, shape in layout.vectors(config))
    if config.tie_word_embeddings and config.quantization is None:
        # Its repository holds the head as well.
        stored += inventory.matrices[layout.EMBEDDING].weight_bytes(2)
    return stored + RELEASED_TOKENIZER_BYTES


def is_estimate(repo_id: str) -> bool:
    """Whether the sizes of a released model have been computed, not published."""
    size, bits = RELEASED[repo_id]
    return bits is not None or size == "0.5B"


def cached_models() -> list[CachedModel]:
    """The Apertus models in the Hub's cache, by name; what else lies there is left out."""
    from huggingface_hub import CacheNotFound, constants, scan_cache_dir

    try:
        found = scan_cache_dir(constants.HF_HUB_CACHE)
    except (CacheNotFound, ValueError):  # no cache yet, or a file in its place
        return []
    models = []
    for repository in found.repos:
        newest = sorted(repository.revisions, key=lambda revision: -revision.last_modified)
        folders = [revision.snapshot_path for revision in newest]
        known = repository.repo_id in RELEASED or any(map(_is_apertus, folders))
        if repository.repo_type != "model" or not known:
            continue
        models.append(
            CachedModel(
                repository.repo_id,
                repository.size_on_disk,
                tuple(revision.commit_hash for revision in newest),
                next((folder for folder in folders if is_complete(folder)), None),
            )
        )
    return sorted(models, key=lambda model: model.repo_id)


def find_cached(repo_id: str) -> CachedModel:
    """The Apertus model `repo_id` in the cache.

    Raises:
        UsageError: a malformed id, or what is in the cache is no Apertus model.
        NotFoundError: it is not in the cache.
    """
    from huggingface_hub import constants

    check_request(repo_id, None)
    for model in cached_models():
        if model.repo_id == repo_id:
            return model
    folder = Path(constants.HF_HUB_CACHE).expanduser() / f"models--{repo_id.replace('/', '--')}"
    if folder.is_dir():
        raise UsageError(f"{repo_id}: is not an Apertus model, so it is not removed")
    raise NotFoundError(f"{repo_id}: is not in the Hub's cache ({folder.parent})")


def remove_cached(model: CachedModel) -> int:
    """Remove all commits of a model from the cache; returns the bytes that this frees."""
    from huggingface_hub import constants, scan_cache_dir

    found = scan_cache_dir(constants.HF_HUB_CACHE)
    # A commit of the same id in another repository stays.
    own = frozenset(each for each in found.repos if each.repo_id == model.repo_id)
    strategy = replace(found, repos=own).delete_revisions(*model.commits)
    strategy.execute()
    return strategy.expected_freed_size


def _is_apertus(snapshot: Path) -> bool:
    try:
        return read_object(snapshot / CONFIG_FILE).get("model_type") in tuple(MODEL_TYPES)
    except RejectedError:
        return False
