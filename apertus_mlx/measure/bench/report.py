"""What was found, as values: everything that `bench --json` holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from apertus_mlx import __version__
from apertus_mlx.cache.config import CacheConfig
from apertus_mlx.checkpoint import layout
from apertus_mlx.checkpoint.inventory import Inventory
from apertus_mlx.measure.bench.roofline import Bandwidth, kv_read_bytes, weights_read_bytes
from apertus_mlx.measure.bench.sides import Ready
from apertus_mlx.measure.bench.turns import Figure, rates, ratios
from apertus_mlx.measure.bench.workload import Task, Workload
from apertus_mlx.measure.doctor.facts import Facts


@dataclass(frozen=True, slots=True)
class Model:
    """What was measured; `weights_read_bytes` are those of one token."""

    name: str
    parameters: int
    bits_per_weight: float
    weights_read_bytes: int
    context_tokens: int


@dataclass(frozen=True, slots=True)
class Measurement:
    """One task on one side; what concerns the roofline is None for a prompt.

    `seconds` has the turns of each round, `kv_read_bytes` is an average of the timed tokens.
    """

    task: Task
    tokens_per_s: Figure
    seconds: list[list[float]]
    kv_read_bytes: int | None = None
    roofline_tokens_per_s: float | None = None
    roofline_share: float | None = None


@dataclass(frozen=True, slots=True)
class SideReport:
    """One side; `start_s` is from starting its process to a model that is ready.

    `speculation`: what a draft was good for in all that was decoded.
    """

    name: str
    ready: Ready
    start_s: float
    peak_memory_bytes: int
    measurements: list[Measurement]
    speculation: dict[str, object] | None = None


@dataclass(frozen=True, slots=True)
class Ratio:
    """How many times as fast the first side was."""

    task: Task
    ratio: Figure


@dataclass(frozen=True, slots=True)
class Report:
    """Everything."""

    date: str
    apertus_mlx_version: str
    machine: Facts
    bandwidth_bytes_per_s: Bandwidth
    model: Model
    workload: Workload
    sides: list[SideReport]
    ratios: list[Ratio]
    notes: list[str]


def measurements(
    inventory: Inventory,
    bandwidth: Bandwidth | None,
    workload: Workload,
    ready: Ready,
    form: CacheConfig,
    taken: Mapping[Task, list[list[float]]],
) -> list[Measurement]:
    """What a side with caches of `form` did: `taken` are seconds, a list of rounds per task.

    Without a `bandwidth` there is no roofline.
    """
    weights = weights_read_bytes(inventory)
    found = []
    for task, seconds in taken.items():
        figure = rates(workload.timed_tokens(task), seconds)
        if task.kind == "prefill":
            found.append(Measurement(task, figure, seconds))
            continue
        depth, steps = max(task.tokens, 1), workload.new_tokens
        kv = kv_read_bytes(inventory.config, form, depth, steps, ready.number_bytes)
        if bandwidth is None:
            found.append(Measurement(task, figure, seconds, kv))
            continue
        most = bandwidth.reference / (weights + kv)
        found.append(Measurement(task, figure, seconds, kv, most, figure.median / most))
    return found


def make_report(
    inventory: Inventory,
    name: str,
    machine: Facts,
    bandwidth: Bandwidth,
    workload: Workload,
    sides: list[SideReport],
    date: datetime,
) -> Report:
    """Put together what `sides` found; there are two at most."""
    parameters = layout.parameter_count(inventory.config)
    model = Model(
        name,
        parameters,
        8 * inventory.stored_bytes / parameters,
        weights_read_bytes(inventory),
        inventory.config.max_position_embeddings,
    )
    compared = [
        Ratio(ours.task, ratios(ours.seconds, theirs.seconds))
        for second in sides[1:]
        for ours, theirs in zip(sides[0].measurements, second.measurements, strict=True)
    ]
    stamp = date.isoformat(timespec="seconds")
    notes = _notes(machine, bandwidth)
    return Report(stamp, __version__, machine, bandwidth, model, workload, sides, compared, notes)


def _notes(machine: Facts, bandwidth: Bandwidth) -> list[str]:
    notes = []
    if not machine.metal:
        notes.append("MLX has no Metal on this machine: nothing about Metal was measured")
    if bandwidth.published is None:
        notes.append("no bandwidth is published for this chip: rooflines use the measured one")
    return notes
