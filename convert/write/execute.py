"""Follows a plan: reads blocks of rows, transforms them, writes each where the plan says.

Decides nothing. Memory depends on the block size, not on the size of a tensor, shard or model:
groups never cross a row, so blocks of rows give the same bits as whole tensors.
"""

from __future__ import annotations

import functools
import itertools
import os
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import mlx.core as mx
import numpy as np

from apertus_mlx.backend.hardware import has_gpu
from apertus_mlx.convert.calibration.calibrated import read_codes, with_tuned_norms
from apertus_mlx.convert.evaluation.layerwise import Weights
from apertus_mlx.convert.plan.grids import grid_codes
from apertus_mlx.convert.plan.plan import OutputFile, OutputTensor, Plan, Step
from apertus_mlx.convert.sources.reading import MLX_TYPES, Reader
from apertus_mlx.convert.transforms.weights import transformed_weights
from apertus_mlx.convert.write.workspace import Workspace
from apertus_mlx.errors import RejectedError
from apertus_mlx.quant import search
from apertus_mlx.quant.arrays import Array, Float32

CHECK_BLOCK_BYTES = 4 * 2**20
# Blocks that are computed at once, and the one that is written.
BLOCKS_IN_FLIGHT = 3


def execute(
    plan: Plan,
    source: Path,
    workspace: Workspace,
    progress: Callable[[int], None],
    calibrated: Path | None = None,
) -> None:
    """Write all shards of `plan` into `workspace`; skips the steps that its journal proves done.

    Args:
        plan: what to do.
        source: the folder that the plan was made for.
        workspace: where to write.
        progress: called with the number of source bytes that are dealt with.
        calibrated: where the codes of calibrated steps lie (`calibrated.make_codes`).

    Raises:
        RejectedError: a source value is not finite, or does not fit the output's type.
    """
    done_bytes = 0
    with Reader(source) as reader, _Shards(workspace.path, plan.files) as shards:
        weights = with_tuned_norms(transformed_weights(plan, reader, calibrated), calibrated)
        for number, step in enumerate(plan.steps):
            recorded = workspace.done.get(number)
            if recorded is None or shards.checksum(step) != recorded:
                for block_bytes in _run(
                    step, reader, shards, plan.request.allow_nonfinite, calibrated, weights
                ):
                    progress(done_bytes + block_bytes)
                workspace.record(number, shards.finish(step))
            done_bytes += step.source_bytes
            progress(done_bytes)


def _run(
    step: Step,
    reader: Reader,
    shards: _Shards,
    allow_nonfinite: bool,
    calibrated: Path | None,
    weights: Weights,
) -> Iterator[int]:
    """Produce one step's tensors; yields the source bytes dealt with after each block."""
    if step.matrix is None:
        vector = mx.array(weights.vector(step.path)).reshape(step.outputs[0].shape)
        vector = _in_type(vector, MLX_TYPES[step.dtype], step, allow_nonfinite)
        shards.append(step.outputs[0], vector)
        yield step.source_bytes
        return
    rows = step.outputs[0].shape[0]
    size = step.block_rows
    streams = itertools.cycle(_streams())
    codes = whole = None
    if step.method == "gptq":
        assert calibrated is not None
        codes = read_codes(calibrated, step)
    elif step.changes_basis:
        # Rows in another basis depend on all rows.
        whole = weights.matrix(step.path)
    pending: deque[tuple[int, tuple[mx.array, ...]]] = deque()
    for start in range(0, rows, size):
        stop = min(start + size, rows)
        with mx.stream(next(streams)):
            if codes is not None:
                arrays = tuple(array[start:stop] for array in codes)
            else:
                arrays = _matrix_block(step, reader, start, stop, allow_nonfinite, whole)
        # Computed on another thread while the next block is read.
        mx.async_eval(*arrays)
        pending.append((stop, arrays))
        if len(pending) == BLOCKS_IN_FLIGHT:
            yield _write(step, shards, *pending.popleft())
    while pending:
        yield _write(step, shards, *pending.popleft())
    if step.matrix.stored is not None and step.transform == "keep" and step.matrix.stored.factor:
        shards.append(step.outputs[-1], step.matrix.read_factor(reader))


def _write(step: Step, shards: _Shards, stop: int, arrays: tuple[mx.array, ...]) -> int:
    """Append the rows before `stop` to the step's tensors; returns the source bytes done."""
    for tensor, array in zip(step.outputs, arrays, strict=False):
        shards.append(tensor, array)
    return step.source_bytes * stop // step.outputs[0].shape[0]


@functools.cache
def _streams() -> tuple[mx.Stream, ...]:
    """A CPU stream is one thread; a GPU needs no more than its own."""
    if has_gpu():
        return (mx.default_stream(mx.gpu),)
    return tuple(mx.new_stream(mx.cpu) for _ in range(BLOCKS_IN_FLIGHT - 1))


def _matrix_block(
    step: Step,
    reader: Reader,
    start: int,
    stop: int,
    allow_nonfinite: bool,
    whole: Float32 | None,
) -> tuple[mx.array, ...]:
    matrix = step.matrix
    assert matrix is not None
    if step.transform == "keep":
        codes = matrix.read_codes(reader, start, stop)
        if codes.biases is None:
            return codes.weight, codes.scales
        target = MLX_TYPES[step.outputs[1].dtype]
        return codes.weight, *(_in_type(a, target, step) for a in (codes.scales, codes.biases))
    if whole is not None:
        values = mx.array(whole[start:stop])
    else:
        values = matrix.read(reader, start, stop, allow_nonfinite)
    dtype = MLX_TYPES[step.dtype]
    values = _in_type(values, dtype, step, allow_nonfinite)
    if step.spec is None:
        return (values,)
    spec = step.spec
    if step.grid is not None:
        found = grid_codes(values, spec, step.dtype, step.grid)
        if found is None or found.biases is None:
            raise RejectedError(f"{step.path}: changed since its grid was found; start again")
        return found.weight, found.scales, found.biases
    if step.method == "search":
        wide: Array = values.astype(mx.float32)
        if not has_gpu():
            wide = np.array(wide)
        best = search.fit(wide, spec, scale_type=step.dtype)
        scales, biases = (mx.array(array).astype(dtype) for array in (best.scales, best.biases))
        return mx.array(best.packed), scales, biases
    return tuple(mx.quantize(values, group_size=spec.group_size, bits=spec.bits, mode=spec.mode))


def _in_type(
    values: mx.array, target: mx.Dtype, step: Step, allow_nonfinite: bool = False
) -> mx.array:
    if values.dtype == target:
        return values
    cast = values.astype(target)
    if not allow_nonfinite and target != mx.float32 and not mx.isfinite(cast).all():
        other = "bfloat16" if target == mx.float16 else "float32"
        raise RejectedError(f"{step.path}: values beyond the range of {target}; --dtype {other}")
    return cast


class _Shards(ExitStack):
    """The output files, written at the places that the plan gives to each tensor."""

    def __init__(self, directory: Path, files: tuple[OutputFile, ...]) -> None:
        super().__init__()
        self._headers = {file.name: len(file.header) for file in files}
        self._descriptors: dict[str, int] = {}
        self._written: dict[str, int] = {}
        self._checksums: dict[str, int] = {}
        for file in files:
            descriptor = os.open(directory / file.name, os.O_RDWR | os.O_CREAT, 0o666)
            self.callback(os.close, descriptor)
            self._descriptors[file.name] = descriptor
            _write_all(descriptor, file.header, 0)

    def append(self, tensor: OutputTensor, array: mx.array) -> None:
        """Write the next rows of `tensor`."""
        data = _bytes(array)
        position = self._written.get(tensor.name, 0)
        if position + len(data) > tensor.size_bytes:
            raise AssertionError(f"{tensor.name}: more bytes than planned")
        _write_all(self._descriptors[tensor.file], data, self._offset(tensor) + position)
        self._written[tensor.name] = position + len(data)
        self._checksums[tensor.name] = zlib.crc32(data, self._checksums.get(tensor.name, 0))

    def finish(self, step: Step) -> int:
        """The checksum of a step whose tensors are all written."""
        total = 0
        for tensor in step.outputs:
            if self._written.pop(tensor.name, 0) != tensor.size_bytes:
                raise AssertionError(f"{tensor.name}: fewer bytes than planned")
            total = _combine(total, self._checksums.pop(tensor.name, 0))
        return total

    def checksum(self, step: Step) -> int:
        """The checksum of what lies at a step's places now."""
        total = 0
        for tensor in step.outputs:
            value = 0
            start = self._offset(tensor)
            for offset in range(0, tensor.size_bytes, CHECK_BLOCK_BYTES):
                size = min(CHECK_BLOCK_BYTES, tensor.size_bytes - offset)
                value = zlib.crc32(
                    os.pread(self._descriptors[tensor.file], size, start + offset), value
                )
            total = _combine(total, value)
        return total

    def _offset(self, tensor: OutputTensor) -> int:
        return self._headers[tensor.file] + tensor.offset


def _combine(total: int, checksum: int) -> int:
    return zlib.crc32(checksum.to_bytes(4, "little"), total)


def _bytes(array: mx.array) -> memoryview:
    if array.dtype == mx.bfloat16:
        array = array.view(mx.uint16)
    # MLX views of an array without dimensions need one.
    flat = np.array(array.reshape(-1), copy=False)
    return np.ascontiguousarray(flat).data.cast("B")


def _write_all(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(descriptor, view, offset)
        view = view[count:]
        offset += count
