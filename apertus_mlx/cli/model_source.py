"""A command's model: found in a folder, on the Hub or in the wheel, then opened and loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from apertus_mlx.cli.progress import byte_progress, show_progress
from apertus_mlx.cli.sink import note

if TYPE_CHECKING:
    from apertus_mlx.checkpoint.inventory import Inventory
    from apertus_mlx.generation.model_folder import LoadedModel, ModelFolder
    from apertus_mlx.generation.options import DraftOptions, RunOptions
    from apertus_mlx.memory import Fit


def locate_model(model: str | None, revision: str | None, offline: bool) -> Path:
    """The folder of `model`, fetched from the Hub if it is an id; the embedded one by default."""
    from apertus_mlx.hub import locate

    with show_progress() as progress:
        return locate(model, revision=revision, offline=offline, progress=progress)


def open_model(model: str | None, options: RunOptions) -> ModelFolder:
    """Find and open the folder of `model`; tells what in it is not used.

    Of several ranks each has the inventory of its part.
    """
    from apertus_mlx.backend.ranks import joined
    from apertus_mlx.generation.agreement import require_same_model
    from apertus_mlx.generation.model_folder import open_folder
    from apertus_mlx.generation.own_part import own_part

    folder = open_folder(locate_model(model, options.revision, options.offline))
    if (ranks := joined()) is not None:
        require_same_model(ranks, folder.inventory)
    for line in folder.notes:
        note(line)
    return replace(folder, inventory=own_part(folder.inventory, options))


def open_draft(target: ModelFolder, draft: DraftOptions, options: RunOptions) -> ModelFolder | None:
    """Find, open and check the folder of the draft, if it is a model."""
    from apertus_mlx.generation.draft_model import require_draft
    from apertus_mlx.generation.model_folder import open_folder

    if draft.model is None:
        return None
    folder = open_folder(locate_model(draft.model, None, options.offline))
    require_draft(target, folder)
    return folder


def plan_run(
    inventory: Inventory, options: RunOptions, context: int, draft: ModelFolder | None = None
) -> Fit:
    """See `plan_memory`; tells what it chose if that is not the usual."""
    from apertus_mlx.generation.memory_plan import describe_plan, plan_draft, plan_memory

    beside = 0 if draft is None else plan_draft(draft.inventory, options, context)
    plan = plan_memory(inventory, options, context, beside)
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


def load_draft(
    target: LoadedModel, draft: ModelFolder | None, chosen: DraftOptions, options: RunOptions
) -> LoadedModel:
    """The model with its draft, if it has one, whose weights are loaded."""
    from apertus_mlx.generation.draft_model import load_drafting

    with byte_progress("loading the draft") as update:
        drafting = load_drafting(target.folder, draft, chosen, options, update)
    return replace(target, drafting=drafting)
