"""A model folder -> a model with weights, ready to run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from apertus_mlx.backend import command_buffers, hardware, tf32
from apertus_mlx.backend.part_reader import read_part
from apertus_mlx.backend.ranks import Ranks
from apertus_mlx.checkpoint import layout
from apertus_mlx.checkpoint.inventory import (
    OUTPUT_DIVISOR,
    OUTPUT_SCALE,
    Inventory,
    take_inventory,
)
from apertus_mlx.checkpoint.matching import XIELU_DEFAULTS
from apertus_mlx.checkpoint.tensors import Checkpoint
from apertus_mlx.errors import RejectedError
from apertus_mlx.model.apertus import Model
from apertus_mlx.model.disk_embedding import DiskEmbedding
from apertus_mlx.model.linear import ScaledLinear
from apertus_mlx.model.split_model import SplitModel
from apertus_mlx.model.stages import StagedModel
from apertus_mlx.quant.spec import QuantSpec
from apertus_mlx.system.model_files import checked, open_file
from apertus_mlx.system.sizes import counted

DTYPES = {"bfloat16": mx.bfloat16, "float16": mx.float16, "float32": mx.float32}


def load_model(directory: Path, dtype: str | None = None) -> Model:
    """Load the model in `directory`, ready to run.

    Args:
        directory: a Hugging Face or MLX folder of an Apertus model.
        dtype: type to compute in: bfloat16, float16 or float32. By default float32 without a GPU
            (16-bit arithmetic is emulated there, and its quantized matmul is wrong by percents),
            and with one bfloat16 if all weights are stored so, else float32.

    Raises:
        NotFoundError, RejectedError: see `take_inventory`; also weights that are not finite.
    """
    return load_inventory(take_inventory(directory), dtype)


def load_inventory(
    inventory: Inventory,
    dtype: str | None = None,
    on_bytes: Callable[[int, int], None] | None = None,
    embedding_on_disk: bool = False,
    ranks: Ranks | None = None,
) -> Model:
    """Load what `take_inventory` found; see `load_model`.

    `on_bytes` is told the bytes read so far and in all. `embedding_on_disk` leaves the rows of an
    untied embedding in the file. Of several `ranks` each loads the part that `inventory` is of.

    Raises:
        UsageError: `embedding_on_disk`, but the head is the embedding.
    """
    command_buffers.widen()
    tf32.switch_off()
    part = inventory.part
    assert (ranks is None) == (part is None)
    compute = DTYPES[dtype] if dtype else compute_dtype(inventory)
    if ranks is None or part is None:
        model = Model(inventory.config)
    else:
        of_part = SplitModel if part.layers is None else StagedModel
        model = of_part(inventory.config, part, ranks)
    specs, left = inventory.specs, set[str]()
    if embedding_on_disk:
        model.model.embed_tokens = DiskEmbedding(inventory, compute, hardware.has_metal())
        left = {tensor.name for tensor in inventory.matrices[layout.EMBEDDING].tensors}
        specs.pop(layout.EMBEDDING, None)
    nn.quantize(model, class_predicate=lambda path, _: _as_arguments(specs.get(path)))
    wanted = {name: shape for name, shape in inventory.shapes.items() if name not in left}
    if part is None or part.layers is not None:
        stored = _whole_arrays(inventory, wanted.keys())
    else:
        stored = _own_arrays(inventory, part.rank)
    arrays = dict(_checked_arrays(inventory, wanted, stored, compute, on_bytes))
    factors = {path: arrays.pop(tensor.name) for path, tensor in inventory.factors.items()}
    model.load_weights(list(arrays.items()), strict=True)
    _apply_factors(model, inventory, factors)
    model.on_gpu = hardware.has_gpu()
    model.whole_codes = hardware.refuses_slices()
    # CUDA compiles the product that looks up a row at its first use, for half a minute.
    model.fuse(compiled_activation=model.on_gpu, row_by_product=hardware.has_metal())
    if ranks is None or part is None:
        _use_kernels(model, inventory, compute, embedding_on_disk)
    elif isinstance(model, SplitModel):  # the fused kernels know no sum over ranks
        model.share()
    model.eval()
    return model


def _use_kernels(
    model: Model, inventory: Inventory, dtype: mx.Dtype, embedding_on_disk: bool
) -> None:
    """Use the fused kernels that have been proved on this machine; elsewhere there are none.

    A compiled step cannot read a file: it is made once, before there is a token.
    """
    if not hardware.has_metal():
        return
    from apertus_mlx.backend.metal.compiled_step import CompiledStep
    from apertus_mlx.backend.metal.enabled import enabled
    from apertus_mlx.backend.metal.fused import FusedStep

    found = enabled(inventory.config, inventory.specs, dtype)
    if found.kernels:
        step = FusedStep(found.kernels)
        compiles = found.compiled_step and not embedding_on_disk
        model.use(CompiledStep(step) if compiles else step)


def _as_arguments(spec: QuantSpec | None) -> dict[str, Any] | bool:
    if spec is None:
        return False
    return {"bits": spec.bits, "group_size": spec.group_size, "mode": spec.mode}


def _apply_factors(model: Model, inventory: Inventory, factors: dict[str, mx.array]) -> None:
    modules = dict(model.named_modules())  # type: ignore[no-untyped-call]
    scaled = []
    for path, factor in factors.items():
        divides = inventory.factors[path].name.endswith(OUTPUT_DIVISOR)
        scaled.append((path, ScaledLinear(modules[path], 1 / factor if divides else factor)))
    if scaled:
        model.update_modules(tree_unflatten(scaled))


def compute_dtype(inventory: Inventory) -> mx.Dtype:
    """The type to compute in, unless the user says another; see `load_model`."""
    if not hardware.has_gpu():
        return mx.float32
    return mx.bfloat16 if inventory.float_dtypes <= {"BF16"} else mx.float32


@contextmanager
def _cut_files_named(path: Path, checkpoint: Checkpoint) -> Iterator[None]:
    """Refuse a file that is no longer as long as its header says, whatever MLX makes of it."""
    ends = (t.offset + t.size_bytes for t in checkpoint.tensors.values() if t.file == path.name)
    try:
        yield
    except RuntimeError:
        if checked(path).stat().st_size == max(ends):
            raise
        raise RejectedError(f"{path}: was changed while it was loaded; start again") from None


def _whole_arrays(inventory: Inventory, names: Set[str]) -> Iterator[tuple[str, mx.array]]:
    """The tensors of these names as they are stored; each is read when it is evaluated."""
    checkpoint = inventory.checkpoint
    for file in checkpoint.files:
        path = checkpoint.directory / file
        with _cut_files_named(path, checkpoint):
            loaded = mx.load(str(checked(path)), format="safetensors")
        assert isinstance(loaded, dict)
        for key in sorted(loaded):
            if key in names:
                yield key, loaded.pop(key)


def _own_arrays(inventory: Inventory, rank: int) -> Iterator[tuple[str, mx.array]]:
    """What rank `rank` holds of every tensor; `inventory` is of a part."""
    wanted, checkpoint = inventory.shapes, inventory.checkpoint
    for name in checkpoint.files:
        with open_file(checkpoint.directory / name) as file:
            for key, whole in checkpoint.tensors.items():
                if whole.file == name and key in wanted:
                    yield key, read_part(file, whole, wanted[key], rank)


def _checked_arrays(
    inventory: Inventory,
    shapes: Mapping[str, tuple[int, ...]],
    stored: Iterable[tuple[str, mx.array]],
    compute: mx.Dtype,
    on_bytes: Callable[[int, int], None] | None,
) -> Iterator[tuple[str, mx.array]]:
    """Every parameter of `shapes` in the type that it is computed with, one evaluated at a time."""
    checkpoint, wanted = inventory.checkpoint, dict(shapes)
    done, all_bytes = 0, checkpoint.size_bytes
    if inventory.part is not None:
        known = checkpoint.tensors
        all_bytes = sum(known[name].size_bytes for name in shapes if name in known)
    for key, read in stored:
        array, shape = read, wanted.pop(key)
        del read  # what is stored goes as soon as it is converted
        if mx.issubdtype(array.dtype, mx.floating):
            kept = mx.float32 if key.endswith((OUTPUT_SCALE, OUTPUT_DIVISOR)) else compute
            array = array.astype(kept).reshape(shape)
        with _cut_files_named(checkpoint.path(checkpoint.tensors[key]), checkpoint):
            mx.eval(array)
        if mx.issubdtype(array.dtype, mx.floating) and not mx.isfinite(array).all():
            count = cast(int, mx.sum(~mx.isfinite(array)).item())
            raise RejectedError(
                f"{checkpoint.directory}: {key}: {counted(count, 'value is', 'values are')} "
                "not finite; the weights are damaged"
            )
        done += checkpoint.tensors[key].size_bytes
        if on_bytes is not None:
            on_bytes(done, all_bytes)
        yield key, array
    for key in wanted:
        yield key, mx.array(XIELU_DEFAULTS[key.rsplit(".", 1)[-1]], compute)
