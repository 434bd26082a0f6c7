"""Where a command's model comes from: a folder, the Hub, or the wheel; and loading it, audibly."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from apertus_mlx.cli.options import Compute, Precision
from apertus_mlx.cli.output import note
from apertus_mlx.cli.progress import byte_progress, show_progress

if TYPE_CHECKING:
    from collections.abc import Callable

    from apertus_mlx.checkpoint.inventory import Inventory
    from apertus_mlx.generation.run import Speaker
    from apertus_mlx.text.template import ChatTemplate
    from apertus_mlx.text.tokenizer import Tokenizer


def locate_model(model: str | None, revision: str | None, offline: bool) -> Path:
    """The folder of `model`, fetched from the Hub if it is an id; the embedded one by default."""
    if model is None:
        from apertus_mlx.demo import model_dir

        note("using the small demonstration model in the package; --model takes a real one")
        return model_dir()
    from apertus_mlx.hub import locate

    with show_progress() as progress:
        return locate(model, revision=revision, offline=offline, progress=progress)


def open_speaker(
    directory: Path,
    dtype: str | None,
    compute: Compute,
    precision: Precision,
    before_weights: Callable[[Inventory, Tokenizer, ChatTemplate | None], None],
) -> Speaker:
    """Load the model in `directory`; tells what was ignored in it. See `load_speaker`."""
    from apertus_mlx.backend.hardware import has_gpu
    from apertus_mlx.generation.run import load_speaker

    def tell(inventory: Inventory) -> None:
        for name, reason in inventory.dropped.items():
            note(f"{name}: not used, {reason}")
        if inventory.config.asks_for_code:
            keys = ", ".join(inventory.config.asks_for_code)
            note(f"config.json asks for code of its own ({keys}); never run")

    with byte_progress("loading") as update:
        speaker = load_speaker(
            directory,
            dtype,
            compute=compute.value,
            precision=precision.value,
            on_inventory=tell,
            before_weights=before_weights,
            on_bytes=update,
        )
    if not has_gpu():
        note("MLX has no GPU on this machine: computing on the CPU")
    if speaker.generation_config.ignored_keys:
        note(
            "generation_config.json: not implemented, ignored: "
            + ", ".join(speaker.generation_config.ignored_keys)
        )
    return speaker
