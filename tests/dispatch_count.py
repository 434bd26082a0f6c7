"""How many kernels MLX starts on a GPU for one decode step, counted on any machine.

A CPU build of MLX takes its fast operations apart, and cannot run Metal kernels, but it can trace
both: fast operations are replaced by single primitives of the same shape, and kernels stay what
they are. The traced graph is then put in the order in which MLX would evaluate it (a degree pass,
then a tape of limited width, as in mlx/transforms.cpp), with a barrier wherever a kernel touches a
buffer that was written since the last one (mlx/backend/metal/device.cpp). Reuse of freed buffers is
not modelled.

Views start nothing: they are what `VIEWS` lists.
"""

from __future__ import annotations

import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

VIEWS = {
    "Broadcast", "BroadcastAxes", "Depends", "ExpandDims", "Flatten", "Reshape", "Slice", "Split",
    "Squeeze", "StopGradient", "Transpose", "Unflatten",
}  # fmt: skip
# Primitives that no model uses stand in for those that a CPU build would take apart.
STAND_INS = {"ArcSin": "RMSNorm", "ArcCos": "RoPE", "ArcTan": "Attention", "ArcSinh": "Dequantize"}
# MLX's defaults on an M-series chip that is neither Max nor Ultra.
TAPE_WIDTH, MAX_KERNELS_PER_BUFFER = 20, 40


@dataclass(frozen=True)
class Dispatches:
    """What a step costs: kernels by name, groups that must wait for each other, buffers."""

    kernels: dict[str, int]
    epochs: int
    command_buffers: int

    @property
    def total(self) -> int:
        return sum(self.kernels.values())


@dataclass(frozen=True)
class Graph:
    """Primitives with the arrays they read and write; `outputs` are what is asked for."""

    names: dict[str, str]
    reads: dict[str, list[str]]
    writes: dict[str, list[str]]
    outputs: list[str]


def count_dispatches(step: Callable[[], Sequence[mx.array]]) -> Dispatches:
    """Count what evaluating the arrays that `step` returns would start."""
    graphs: list[Graph] = []

    def traced(_: mx.array) -> list[mx.array]:
        with _single_primitives():
            graphs.append(_read(step()))
        raise _Traced  # nothing is to be exported

    with tempfile.TemporaryDirectory() as folder, suppress(_Traced):
        mx.export_function(str(Path(folder) / "step.mlxfn"), traced, mx.array(0))
    (graph,) = graphs
    return _replay(graph, _order(graph))


class _Traced(Exception):
    """The trace has been seen."""


@contextmanager
def _single_primitives() -> Iterator[None]:
    def norm(x: mx.array, *_: Any, **__: Any) -> mx.array:
        return mx.arcsin(x)

    def rope(x: mx.array, *_: Any, **__: Any) -> mx.array:
        return mx.arccos(x)

    def attention(queries: mx.array, keys: mx.array, values: mx.array, **_: Any) -> mx.array:
        return mx.arctan(mx.depends([queries], [keys, values])[0])

    def dequantize(codes: mx.array, scales: mx.array, biases: mx.array, **given: Any) -> mx.array:
        width = scales.shape[-1] * given["group_size"]
        row = mx.depends([scales], [codes, biases])[0][..., :1]
        return mx.arcsinh(mx.broadcast_to(row, (*scales.shape[:-1], width)))

    replaced = {
        (mx.fast, "rms_norm"): norm,
        (mx.fast, "rope"): rope,
        (mx.fast, "scaled_dot_product_attention"): attention,
        (mx, "dequantize"): dequantize,
    }
    originals = {key: getattr(*key) for key in replaced}
    for (module, name), stand_in in replaced.items():
        setattr(module, name, stand_in)
    try:
        yield
    finally:
        for (module, name), original in originals.items():
            setattr(module, name, original)


def _read(outputs: Sequence[mx.array]) -> Graph:
    """The graph behind `outputs`, from the picture that MLX draws of it."""
    named = {f"out{index}": output for index, output in enumerate(outputs)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "graph.dot"
        mx.export_to_dot(str(path), **named)
        lines = path.read_text().splitlines()
    names: dict[str, str] = {}
    reads, writes = defaultdict(list), defaultdict(list)
    # Compiled primitives are shared by their calls: each mention of a label is a call of its own.
    current: dict[str, str] = {}
    for line in lines:
        if label := re.match(r'\{ (\d+) \[label ="([^"]+)"', line):
            current[label[1]] = f"{label[1]}#{len(names)}"
            names[current[label[1]]] = label[2]
        elif edge := re.match(r'"([^"]+)" -> (\d+)', line):
            reads[current[edge[2]]].append(edge[1])
        elif edge := re.match(r'(\d+) -> "([^"]+)"', line):
            writes[current[edge[1]]].append(edge[2])
    return Graph(names, reads, writes, list(named))


def _order(graph: Graph) -> list[str]:
    """The arrays of the graph in MLX's order of evaluation."""
    source = {array: primitive for primitive, made in graph.writes.items() for array in made}
    end = "end"

    def inputs(array: str) -> list[str]:
        return graph.outputs if array == end else graph.reads[source[array]]

    def siblings(array: str) -> list[str]:
        return [] if array == end else [x for x in graph.writes[source[array]] if x != array]

    waiting: dict[str, int] = {}
    path = [[end, 0]]
    while path:
        array, index = str(path[-1][0]), int(path[-1][1])
        if index == len(inputs(array)):
            path.pop()
            continue
        path[-1][1] = index + 1
        needed = inputs(array)[index]
        if needed not in source:
            continue
        if needed in waiting:
            waiting[needed] += 1
            for sibling in siblings(needed):
                waiting[sibling] += 1
        else:
            path.append([needed, 0])
            waiting[needed] = 1
            for sibling in siblings(needed):
                waiting.setdefault(sibling, 1)

    tape, postponed, position = [end], [], 0
    while waiting and (position < len(tape) or postponed):
        if position < len(tape):
            array, index = tape[position], 0
            position += 1
        else:
            array, index = postponed.pop()
        needs = inputs(array)
        while index < len(needs):
            needed = needs[index]
            if needed not in source:
                index += 1
                continue
            if len(tape) - position >= TAPE_WIDTH:
                postponed.append((array, index))
                break
            index += 1
            waiting[needed] -= 1
            if waiting[needed]:
                for sibling in siblings(needed):
                    waiting[sibling] -= 1
                continue
            for made in (needed, *siblings(needed)):
                waiting.pop(made, None)
            tape.append(needed)
    return [array for array in reversed(tape) if array != end]


def _replay(graph: Graph, order: Sequence[str]) -> Dispatches:
    source = {array: primitive for primitive, made in graph.writes.items() for array in made}
    memory: dict[str, str] = {}

    def buffer(array: str) -> str:
        return memory.get(array, array)

    kernels: Counter[str] = Counter()
    epochs = buffers = 1
    in_buffer = 0
    touched: set[str] = set()
    written: set[str] = set()
    for array in order:
        primitive = source[array]
        name = graph.names[primitive]
        arrays, made = graph.reads[primitive], graph.writes[primitive]
        if name in VIEWS:
            shared = arrays[:1] * len(made) if name == "Split" else arrays
            memory.update({new: buffer(old) for new, old in zip(made, shared, strict=False)})
            continue
        kernels[STAND_INS.get(name, "Compiled" if name.startswith("Compiled") else name)] += 1
        reading = [buffer(x) for x in arrays]
        if name == "SliceUpdate":  # in place: the buffer is the one it updates
            memory[array] = buffer(arrays[0])
            reading = [buffer(arrays[1])]
        writing = [buffer(x) for x in made]
        in_buffer += 1
        if in_buffer > MAX_KERNELS_PER_BUFFER:
            buffers, in_buffer = buffers + 1, 1
            touched, written = set(), set()
        if written.intersection(reading + writing) or touched.intersection(writing):
            epochs += 1
            touched, written = set(), set()
        touched.update(reading + writing)
        written.update(writing)
    return Dispatches(dict(kernels), epochs, buffers)
