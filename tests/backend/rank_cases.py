"""What one rank computes of models split over several; run by test_ranks.py, in each process."""

from __future__ import annotations

import json
import sys
from collections import deque
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from apertus_mlx.backend.ranks import Ranks, join
from apertus_mlx.cache import CacheConfig
from apertus_mlx.checkpoint.inventory import take_inventory
from apertus_mlx.errors import UsageError
from apertus_mlx.generation.agreement import require_same_model
from apertus_mlx.generation.decode import prefill
from apertus_mlx.generation.model_folder import LoadedModel, open_folder
from apertus_mlx.generation.options import RunOptions, SamplingOptions
from apertus_mlx.generation.own_part import own_part
from apertus_mlx.generation.run import Generation
from apertus_mlx.model.apertus import Model

PROMPT = [1, *(74 + 7 * i % 256 for i in range(150))]
# With how far logits may be off, as a share of the largest. Of a number between two codes either
# may be taken, which then makes all the difference between them.
FORMS = {
    "full": (CacheConfig(), 1e-5),
    "bounded": (CacheConfig(bound=48), 1e-5),
    "8 bits": (CacheConfig(8, 8, window=8), 1e-3),
    "4 bits, 2 bits": (CacheConfig(4, 2, window=8), 5e-2),
    "bounded codes": (CacheConfig(8, 8, window=8, bound=112), 1e-3),
}
# Greedy, and drawn by chance with penalties.
DRAWS = {
    "greedy": SamplingOptions(max_tokens=8, temperature=0),
    "seeded": SamplingOptions(
        max_tokens=8, temperature=1.5, top_p=1, seed=7, repetition_penalty=1.2
    ),
}


def load(folder: Path, memory_limit: str | None = None) -> LoadedModel:
    """With a limit split by layers."""
    by_layers = memory_limit is not None
    options = RunOptions(
        compute="mlx", dtype="float32", pipeline=by_layers, memory_limit=memory_limit
    )
    opened = open_folder(folder)
    return replace(opened, inventory=own_part(opened.inventory, options)).load(options)


def logits(loaded: LoadedModel, form: CacheConfig) -> np.ndarray:
    """After a prompt that is read in three chunks, and after each of five more tokens."""
    model = loaded.model
    cache = model.make_cache(form)
    found = [prefill(model, PROMPT, cache, step=64)]
    for token in (80, 90, 100, 110, 120):
        found.append(model.next_token_logits(mx.array([[token]]), cache).values)
    return np.array(mx.stack(found))


def tokens(loaded: LoadedModel, options: SamplingOptions) -> list[int]:
    run = Generation(loaded, PROMPT, options)
    deque(run, maxlen=0)
    return run.token_ids


def results(
    folders: list[Path], briefly: bool = False, memory_limit: str | None = None
) -> dict[str, np.ndarray]:
    """Of the first model all, of the others less; or `briefly` of each something else."""
    some: list[tuple[list[str], list[str]]] = [(list(FORMS), list(DRAWS))]
    some += [(["full"], list(DRAWS))] * (len(folders) - 1)
    if briefly:
        some = [(["full"], ["greedy"]), (["bounded codes"], []), (["full"], ["seeded"])]
    found = {}
    for folder, (forms, draws) in zip(folders, some, strict=True):
        loaded = load(folder, memory_limit)
        for name in forms:
            found[f"{folder.name}; {name}"] = logits(loaded, FORMS[name][0])
        found[f"{folder.name}; bytes"] = np.array(held_bytes(loaded))
        for name in draws:
            found[f"{folder.name}; {name}"] = np.array(tokens(loaded, DRAWS[name]))
    return found


def stopped(ranks: Ranks, folder: Path, memory_limit: str | None) -> list[object]:
    """An answer that the last rank alone wants to stop behind its fourth token."""
    run = Generation(
        load(folder, memory_limit),
        PROMPT,
        DRAWS["greedy"],
        cancelled=lambda: ranks.rank == ranks.size - 1 and len(run.token_ids) >= 4,
    )
    deque(run, maxlen=0)
    return [run.token_ids, run.answer.finish_reason]


def refused(ranks: Ranks, folders: list[Path]) -> str:
    """What is said where the last rank has another model."""
    folder = folders[1 if ranks.rank == ranks.size - 1 else 0]
    try:
        require_same_model(ranks, take_inventory(folder))
    except UsageError as error:
        return str(error)
    return ""


def held_bytes(loaded: LoadedModel) -> int:
    assert isinstance(loaded.model, Model)
    return sum(array.nbytes for _, array in tree_flatten(loaded.model.parameters()))


if __name__ == "__main__":
    ranks = join()
    assert ranks is not None
    limits, briefly, target, *given = *sys.argv[1:3], *map(Path, sys.argv[3:])
    limit = limits.split(",")[ranks.rank] if limits else None
    np.savez(target / f"rank{ranks.rank}.npz", **results(given, briefly == "briefly", limit))
    told = {"stopped": stopped(ranks, given[0], limit), "refused": refused(ranks, given)}
    (target / f"rank{ranks.rank}.json").write_text(json.dumps(told))
