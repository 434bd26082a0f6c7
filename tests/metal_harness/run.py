"""Runs a compiled kernel under several schedules that must agree bit for bit."""

from __future__ import annotations

import ctypes
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from pathlib import Path

from .errors import HarnessError

# What one buffer of a launch is: the bytes of an input, or the size in bytes of an output.
Contents = bytes | int
NOT_WRITTEN_BESIDE = -(2 ** (8 * ctypes.sizeof(ctypes.c_ssize_t) - 1))
CPU_LIMIT_S = 20.0


class Order(IntEnum):
    """In which order threads, simdgroups and threadgroups run."""

    # Each simdgroup runs as far ahead of the others as barriers permit.
    FORWARD = 0
    REVERSE = 1
    # Another order at each step.
    RANDOM = 2


@dataclass(frozen=True, slots=True)
class Schedule:
    """One way to run a kernel that must not make a difference."""

    order: Order
    # Fills outputs, threadgroup memory and what lies beside buffers before the launch.
    poison: int
    seed: int = 0


SCHEDULES = (
    Schedule(Order.FORWARD, 0xA5),
    Schedule(Order.REVERSE, 0x5A),
    Schedule(Order.RANDOM, 0xFF, seed=7),
)


@dataclass(frozen=True, slots=True)
class Extent:
    """What a launch is given besides its buffers."""

    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    reduces_pairwise: bool = False


class _Buffer(ctypes.Structure):
    """The same fields as in cpp/runtime/buffers.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("bytes", ctypes.c_size_t),
        ("pages", ctypes.c_void_p),
        ("page_bytes", ctypes.c_size_t),
    )


class _Request(ctypes.Structure):
    """The same fields as in cpp/runtime/launch.cpp."""

    _fields_ = (
        ("buffers", ctypes.POINTER(ctypes.c_void_p)),
        ("grid", ctypes.c_uint32 * 3),
        ("threadgroup", ctypes.c_uint32 * 3),
        ("order", ctypes.c_int32),
        ("seed", ctypes.c_uint32),
        ("reduces_pairwise", ctypes.c_int32),
        ("poison", ctypes.c_int32),
        ("cpu_limit_s", ctypes.c_double),
    )


@cache
def load(path: Path) -> ctypes.PyDLL:
    """The compiled kernel; a launch keeps the interpreter's lock, as its state is the library's."""
    library = ctypes.PyDLL(str(path))
    buffer = ctypes.POINTER(_Buffer)
    library.harness_allocate.argtypes = (buffer, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_int)
    library.harness_written_beside.argtypes = (buffer, ctypes.c_int)
    library.harness_written_beside.restype = ctypes.c_ssize_t
    library.harness_release.argtypes = (buffer,)
    library.harness_release.restype = None
    library.harness_launch.argtypes = (ctypes.POINTER(_Request),)
    library.harness_launch.restype = ctypes.c_char_p
    return library


def run(
    library: ctypes.PyDLL,
    buffers: Sequence[Contents],
    names: Sequence[str],
    extent: Extent,
    schedules: Sequence[Schedule],
    cpu_limit_s: float,
) -> list[bytes]:
    """The outputs of a kernel.

    Args:
        library: the compiled kernel.
        buffers: all its buffers, in the order of its parameters.
        names: of the buffers, for messages.
        extent: threads to run.
        schedules: the ways to run it.
        cpu_limit_s: processor time that one launch may take.

    Raises:
        HarnessError: the kernel is faulty, or its outputs depend on the schedule.
    """
    runs = [_run_once(library, buffers, names, extent, each, cpu_limit_s) for each in schedules]
    output_names = [
        name for name, contents in zip(names, buffers, strict=True) if isinstance(contents, int)
    ]
    for name, *outputs in zip(output_names, *runs, strict=True):
        if len(set(outputs)) > 1:
            raise HarnessError(f"output {name} {_difference(outputs, schedules)}")
    return runs[0]


def _difference(outputs: Sequence[bytes], schedules: Sequence[Schedule]) -> str:
    """Why the same output differs between schedules."""
    differing = (i for i, values in enumerate(zip(*outputs, strict=True)) if len(set(values)) > 1)
    position = next(differing)
    if all(o[position] == each.poison for o, each in zip(outputs, schedules, strict=True)):
        return f"is not written at byte {position}"
    return f"depends on the thread order or on memory never written, first at byte {position}"


def _run_once(
    library: ctypes.PyDLL,
    buffers: Sequence[Contents],
    names: Sequence[str],
    extent: Extent,
    schedule: Schedule,
    cpu_limit_s: float,
) -> list[bytes]:
    with _allocated(library, buffers, schedule.poison) as mapped:
        request = _Request(
            (ctypes.c_void_p * len(mapped))(*(buffer.data for buffer in mapped)),
            extent.grid,
            extent.threadgroup,
            schedule.order,
            schedule.seed,
            extent.reduces_pairwise,
            schedule.poison,
            cpu_limit_s,
        )
        message = library.harness_launch(request)
        if message is not None:
            raise HarnessError(_with_buffer(message.decode(), mapped, names))
        for buffer, name in zip(mapped, names, strict=True):
            offset = library.harness_written_beside(buffer, schedule.poison)
            if offset != NOT_WRITTEN_BESIDE:
                raise HarnessError(f"writes beside {name} ({buffer.bytes} bytes) at byte {offset}")
        return [
            ctypes.string_at(buffer.data, buffer.bytes)
            for buffer, contents in zip(mapped, buffers, strict=True)
            if isinstance(contents, int)
        ]


@contextmanager
def _allocated(
    library: ctypes.PyDLL, buffers: Sequence[Contents], poison: int
) -> Iterator[list[_Buffer]]:
    mapped: list[_Buffer] = []
    try:
        for contents in buffers:
            is_input = isinstance(contents, bytes)
            buffer = _Buffer()
            failed = library.harness_allocate(
                buffer,
                len(contents) if is_input else contents,
                contents if is_input else None,
                poison,
            )
            if failed:
                raise MemoryError("no memory for the buffers of a kernel")
            mapped.append(buffer)
        yield mapped
    finally:
        for buffer in mapped:
            library.harness_release(buffer)


def _with_buffer(message: str, mapped: Sequence[_Buffer], names: Sequence[str]) -> str:
    """Name the buffer that is nearest to a bad access."""
    match = re.search(r"at (0x[0-9a-f]+) by", message)
    if match is None:
        return message
    address = int(match[1], 16)

    def distance(buffer: _Buffer) -> int:
        below, above = buffer.data - address, address - (buffer.data + buffer.bytes - 1)
        return max(below, above, 0)

    nearest = min(range(len(mapped)), key=lambda i: distance(mapped[i]), default=None)
    if nearest is None or distance(mapped[nearest]) > 2**24:
        return message
    buffer = mapped[nearest]
    where = f"byte {address - buffer.data} of {names[nearest]}, which has {buffer.bytes}"
    return message.replace(match[0], f"at {where}, by")


def check_extent(grid: Sequence[int], threadgroup: Sequence[int], threads_limit: int) -> None:
    """Refuse what Metal refuses to dispatch.

    Raises:
        HarnessError: too many threads, or none.
    """
    if math.prod(threadgroup) > threads_limit:
        raise HarnessError(f"{math.prod(threadgroup)} threads in a threadgroup; Metal has 1024")
    if min(*grid, *threadgroup) < 1:
        raise HarnessError(f"grid {tuple(grid)} of threadgroups {tuple(threadgroup)} is empty")
