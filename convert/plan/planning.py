"""Makes a plan from a source and a request; reads no array and writes no file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from apertus_mlx.checkpoint import layout
from apertus_mlx.checkpoint.header import TensorInfo
from apertus_mlx.convert.plan.plan import (
    CONFIG_DTYPES,
    TYPICAL_TOKENIZER_BYTES,
    OutputTensor,
    Plan,
    Step,
    Transform,
)
from apertus_mlx.convert.plan.policy import Request, resolve
from apertus_mlx.convert.plan.shards import MAX_SHARD_BYTES, place
from apertus_mlx.convert.sources.source import MatrixSource, Source, Stored
from apertus_mlx.convert.transforms import names as transforms
from apertus_mlx.errors import RejectedError, UsageError
from apertus_mlx.quant.affine import ScaleType
from apertus_mlx.quant.grid import Kind
from apertus_mlx.quant.spec import QuantSpec
from apertus_mlx.system.sizes import counted

ONLY_VALUES = "the head is the embedding: of --rotate only attention's values are left"
F16_ROUNDING = "relative error up to 0.05 %; below 6.1e-5 absolute, up to 3e-8"
ROUNDING_ERRORS = {"BF16": "relative error up to 0.4 %", "F16": F16_ROUNDING}


def make_plan(
    source: Source,
    request: Request,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    grids: Mapping[str, Kind] | None = None,
    tokenizer_bytes: int = TYPICAL_TOKENIZER_BYTES,
) -> Plan:
    """Decide everything about a conversion.

    Args:
        source: what there is.
        request: what is wanted.
        max_shard_bytes: size at which a new file is begun.
        grids: matrices whose values lie on a grid of their format, by kind (`grids.find_grids`).
        tokenizer_bytes: size of `tokenizer.json`, for the memory estimate.

    Raises:
        UsageError: the request contradicts itself or does not fit the source.
        RejectedError: nothing of what was asked is possible with this source.
    """
    _check_request(source, request)
    dtype = request.dtype or _output_dtype(source, request)
    wanted = resolve(request, source.matrices)
    steps = [
        _matrix_step(matrix, source.matrices[matrix.path], wanted[matrix.path], request, dtype)
        for matrix in source.layout
    ]
    if any(wanted.values()) and not any(step.spec for step in steps):
        raise RejectedError(
            f"{source.name}: no weight matrix divides into {request.default or 'the groups asked'}:"
            " nothing would be quantized; try a smaller --group-size"
        )
    steps = [
        _grid_step(step, grids[step.path]) if grids and step.path in grids else step
        for step in steps
    ]
    for key, shape in layout.vectors(source.config):
        steps.append(_vector_step(key, shape, source.vectors[key], dtype))
    changed = transforms.changed(request, source)
    steps = [
        _transformed_step(step, changed[step.path]) if step.path in changed else step
        for step in steps
    ]
    placed, files = place(_in_model_order(steps), max_shard_bytes)
    notes = _notes(source, placed)
    if request.rotate and source.config.tie_word_embeddings:
        notes += (ONLY_VALUES,)
    return Plan(source, request, dtype, placed, files, notes, tokenizer_bytes)


def _check_request(source: Source, request: Request) -> None:
    if request.target is not None:
        raise UsageError(
            f"{request.target}: what bits do is measured on the weights, which are not here; "
            "download the model first, or plan with --bits"
        )
    if request.requantize and not request.quantizes:
        raise UsageError("--requantize: give the bits to quantize to with --bits")
    if source.is_quantized and request.quantizes and not (request.requantize or request.dequantize):
        raise RejectedError(
            f"{source.name}: is already quantized ({source.format}); without --bits its codes are "
            "kept, --dequantize gives plain weights, --requantize quantizes again with a loss"
        )
    if request.method != "rtn" and not request.quantizes:
        raise UsageError(f"--method {request.method}: give the bits to quantize to with --bits")
    if not source.is_quantized and request.dequantize:
        raise UsageError(f"--dequantize: {source.name} is not quantized")
    if request.allow_nonfinite and (request.quantizes or request.rotate):
        what = "quantization" if request.quantizes else "a rotation"
        raise UsageError(f"--allow-nonfinite: {what} has no place for NaN or infinity")
    if request.smooth and not request.quantizes:
        raise UsageError("--smooth: scales fit a format; give the bits to quantize to with --bits")


def _output_dtype(source: Source, request: Request) -> ScaleType:
    """The type of everything that is not codes, if the user gives none.

    16-bit weights keep their type. Others follow the config where that is 16-bit; if not, they
    become bfloat16 when quantized (float32 scales would make MLX compute everything in float32).
    """
    counts = Counter(matrix.dtype for matrix in source.matrices.values())
    stored = counts.most_common(1)[0][0]
    configured = CONFIG_DTYPES.get(source.config.dtype or "")
    for found in ("BF16", "F16"):
        if stored == found:
            return found
    if configured in ("BF16", "F16"):
        return configured
    return "BF16" if request.quantizes or source.is_quantized else "F32"


def _matrix_step(
    matrix: layout.Matrix,
    source: MatrixSource,
    wanted: QuantSpec | None,
    request: Request,
    dtype: ScaleType,
) -> Step:
    reason = None
    if wanted is not None and not wanted.fits(matrix.columns):
        reason = f"{matrix.columns} columns do not divide into {wanted}"
        wanted = None
    stored = source.stored
    if source.is_quantized and wanted is None and stored is None and not request.dequantize:
        raise RejectedError(
            f"{source.tensors[0].file}: {matrix.path}: {source.no_form}; --dequantize gives plain "
            "weights, --requantize with --bits quantizes again with a loss"
        )
    if stored is not None and not request.dequantize and wanted in (None, stored.spec):
        return _keep_step(matrix, source, stored, dtype, request)
    transform: Transform
    if wanted is not None:
        method, loss = request.method, None
        if method != "rtn" and wanted.mode != "affine":
            raise UsageError(
                f"--method {method}: {matrix.path} is to be {wanted}; it is for affine formats"
            )
        transform = "quantize"
        if source.is_quantized:
            transform, loss = "requantize", "its own codes are given up"
        outputs = _packed_outputs(matrix, wanted, dtype)
        return Step(
            matrix.path, transform, outputs, dtype, wanted, source, loss=loss, method=method
        )
    transform, loss = "dequantize", None
    if not source.is_quantized:
        transform = "copy" if source.dtype == dtype else "cast"
        loss = _cast_loss(source.dtype, dtype)
    outputs = (OutputTensor(matrix.weight, dtype, (matrix.rows, matrix.columns)),)
    return Step(matrix.path, transform, outputs, dtype, matrix=source, reason=reason, loss=loss)


def _grid_step(step: Step, kind: Kind) -> Step:
    weight, *others = step.outputs
    if kind == "exact32":
        others = [replace(tensor, dtype="F32") for tensor in others]
    return replace(step, transform="grid", grid=kind, method="rtn", outputs=(weight, *others))


def _transformed_step(step: Step, option: str) -> Step:
    """The same tensors from weights in another basis, which are computed in float32."""
    if step.transform == "keep":
        raise UsageError(
            f"{option}: {step.path} keeps its codes, and codes cannot change basis; --dequantize "
            "gives weights that can"
        )
    if step.transform == "grid":
        raise UsageError(
            f"{option}: {step.path} lies on a grid of {step.spec}, which would be lost; leave "
            f"{option} out or choose another format"
        )
    transform: Transform = "cast" if step.transform == "copy" else step.transform
    loss = _cast_loss("F32", step.dtype) if step.matrix and not step.spec else step.loss
    return replace(step, transform=transform, loss=loss, changes_basis=True)


def _keep_step(
    matrix: layout.Matrix,
    source: MatrixSource,
    stored: Stored,
    dtype: ScaleType,
    request: Request,
) -> Step:
    scale_dtype, loss = stored.scale_dtype, stored.loss
    if stored.spec.has_biases and request.dtype is not None:
        scale_dtype = request.dtype
        if scale_dtype != "F32" and scale_dtype != stored.scale_dtype:
            loss = f"scales and biases rounded to {scale_dtype}, {ROUNDING_ERRORS[scale_dtype]}"
    outputs = _packed_outputs(matrix, stored.spec, scale_dtype)
    if stored.factor is not None:
        factor = stored.factor
        outputs += (OutputTensor(f"{matrix.path}.{factor.suffix}", factor.dtype, factor.shape),)
    return Step(matrix.path, "keep", outputs, dtype, stored.spec, source, loss=loss)


def _packed_outputs(
    matrix: layout.Matrix, spec: QuantSpec, scale_dtype: str
) -> tuple[OutputTensor, ...]:
    groups = (matrix.rows, spec.groups(matrix.columns))
    weight = OutputTensor(matrix.weight, "U32", (matrix.rows, spec.packed_columns(matrix.columns)))
    scales = OutputTensor(f"{matrix.path}.scales", scale_dtype if spec.has_biases else "U8", groups)
    if not spec.has_biases:
        return weight, scales
    return weight, scales, OutputTensor(f"{matrix.path}.biases", scale_dtype, groups)


def _vector_step(
    key: str, shape: tuple[int, ...], tensor: TensorInfo | None, dtype: ScaleType
) -> Step:
    outputs = (OutputTensor(key, dtype, shape),)
    if tensor is None:
        return Step(key, "fill", outputs, dtype)
    transform: Transform = "copy" if tensor.dtype == dtype else "cast"
    loss = _cast_loss(tensor.dtype, dtype)
    return Step(key, transform, outputs, dtype, vector=tensor, loss=loss)


def _cast_loss(source: str, target: str) -> str | None:
    if source == target or target == "F32":
        return None
    return f"{source} rounded to {target}, {ROUNDING_ERRORS[target]}"


def _in_model_order(steps: list[Step]) -> list[Step]:
    """Embedding first, then layer by layer, then norm and head: how a reader looks for them."""

    def place(step: Step) -> tuple[int, int]:
        if step.path == layout.EMBEDDING:
            return (0, 0)
        if step.path.startswith("model.layers."):
            return (1, int(step.path.split(".")[2]))
        return (2, 0) if step.path.startswith(layout.FINAL_NORM) else (3, 0)

    return sorted(steps, key=place)


def _notes(source: Source, steps: tuple[Step, ...]) -> tuple[str, ...]:
    notes = []
    filled = sum(1 for step in steps if step.transform == "fill")
    if filled:
        absent = counted(filled, "xIELU constant is", "xIELU constants are")
        notes.append(f"{absent} absent: beta 0.5 and eps -1e-6 are written")
    for reason, count in _counted(source.dropped).items():
        notes.append(f"{count} left out: {reason}")
    reasons = {step.path: step.reason for step in steps if step.reason}
    for reason, count in _counted(reasons).items():
        notes.append(f"{count}, not quantized: {reason}")
    losses = {step.path: step.loss for step in steps if step.loss}
    for loss, count in _counted(losses).items():
        notes.append(f"{count}: {loss}")
    on_grid = [step for step in steps if step.transform == "grid"]
    if on_grid:
        lie = counted(len(on_grid), "matrix already lies", "matrices already lie")
        notes.append(f"{lie} on a grid of the wanted format: codes and scales are kept")
    types = {tensor.dtype for step in steps if step.spec for tensor in step.outputs}
    if "F32" in types - {"U32"} and any(step.spec and step.spec.has_biases for step in steps):
        notes.append("float32 scales make MLX compute in float32; --dtype bfloat16 is usual")
    config = source.config
    if config.output_vocab_size != config.vocab_size:
        notes.append(
            "the head has fewer rows than the embedding: only apertus-mlx and ApertusKit run this"
        )
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        notes.append("head_dim is not hidden/heads: mlx-lm and mlx-swift-lm cannot run this")
    if any(step.factor is not None for step in steps):
        notes.append("factors stored beside the codes: only apertus-mlx and ApertusKit run this")
    return tuple(notes)


def _counted(reasons: Mapping[str, str]) -> dict[str, str]:
    """Reason -> "first name" or "N tensors"."""
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    return {
        reason: found[0] if len(found) == 1 else counted(len(found), "tensor")
        for reason, found in names.items()
    }
