"""A command's model: found in a folder, on the Hub or in the wheel, then opened and loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from apertus_mlx.cli.progress import byte_progress, show_progress
from apertus_mlx.cli.sink import note

if TYPE_CHECKING:
    from apertus_mlx.checkpoint.inventory import Inventory
    from apertus_mlx.generation.model_folder import LoadedModel, ModelFolder
    from apertus_mlx.generation.options import RunOptions
    from apertus_mlx.memory import Fit


def locate_model(model: str | None, revision: str | None, offline: bool) -> Path:
    """The folder of `model`, fetched from the Hub if it is an id; the embedded one by default."""
    from apertus_mlx.hub import locate

    with show_progress() as progress:
        return locate(model, revision=revision, offline=offline, progress=progress)


def open_model(model: str | None, options: RunOptions) -> ModelFolder:
    """Find and open the folder of `model`; tells what in it is not used."""
    from apertus_mlx.backend.ranks import joined
    from apertus_mlx.generation.agreement import require_same_model
    from apertus_mlx.generation.model_folder import open_folder

    folder = open_folder(locate_model(model, options.revision, options.offline))
    if (ranks := joined()) is not None:
        require_same_model(ranks, folder.inventory)
    for line in folder.notes:
        note(line)
    return folder


def plan_run(inventory: Inventory, options: RunOptions, context: int) -> Fit:
    """See `plan_memory`; tells what it chose if that is not the usual."""
    from apertus_mlx.generation.memory_plan import describe_plan, plan_memory

    plan = plan_memory(inventory, options, context)
    if line := describe_plan(plan, options, context):
        note(line)
    return plan


def load_weights(folder: ModelFolder, options: RunOptions) -> LoadedModel:
    """Load the weights and show how far it is; tells if there is no GPU."""
    from apertus_mlx.backend.hardware import has_gpu

    with byte_progress("loading") as update:
        loaded = folder.load(options, update)
    if not has_gpu():
        note("MLX has no GPU on this machine: computing on the CPU")
    return loaded
