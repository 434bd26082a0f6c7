"""Bits where they matter: formats for all matrices of a model that come to a given size.

Each matrix is measured in each format (`sensitivity`), the best combination is found
(`apertus_mlx.quant.allocate`), and it is kept only if it is at least as good, on texts held out, as
the best uniform width of that size. q, k and v of a layer share a format, since they are multiplied
as one. All that is measured is kept, so that an interrupted run does not measure it again.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from apertus_mlx.checkpoint.config import ModelConfig
from apertus_mlx.convert.calibration import held_out_comparison
from apertus_mlx.convert.calibration.calibrated import Calibration
from apertus_mlx.convert.calibration.held_out_comparison import HeldOutComparison, spread
from apertus_mlx.convert.calibration.sensitivity import Divergences, Prediction, predict_divergences
from apertus_mlx.convert.evaluation.layerwise import SourceWeights
from apertus_mlx.convert.plan.grids import find_grids
from apertus_mlx.convert.plan.plan import WINDOW_TOKENS, Plan
from apertus_mlx.convert.plan.planning import make_plan
from apertus_mlx.convert.plan.policy import DEFAULT_GROUP_SIZE, Request, Rule, Target
from apertus_mlx.convert.sources.reading import Reader
from apertus_mlx.convert.sources.source import Source
from apertus_mlx.convert.transforms.smoothing import Rounding, rounding_of
from apertus_mlx.convert.transforms.weights import unscaled_weights
from apertus_mlx.errors import RejectedError, UsageError
from apertus_mlx.quant import search
from apertus_mlx.quant.allocate import Choice, allocate
from apertus_mlx.quant.spec import AFFINE_BITS, QuantSpec
from apertus_mlx.system.progress import OnLayers
from apertus_mlx.system.sizes import format_bytes

# Groups that are tried where the user names none: the larger ones often buy a bit elsewhere.
GROUP_SIZES = (DEFAULT_GROUP_SIZE, 128)
# Windows to measure on; with twice as many, allocations were no better.
WINDOWS = 8
# How far below the target a size may be, where the widths leave a choice; above it is none.
TOLERANCE = 0.01
# An allocation is taken without calibrating both if rounding both shows that it can be expected to
# have at most this share of the uniform width's divergence.
CLEARLY = 0.8
_JOINED = re.compile(r"\.[qkv]_proj$")

# The plans of all uniform widths; their steps come in one order.
Plans = Mapping[QuantSpec, Plan]


@dataclass(frozen=True, slots=True)
class Allocation:
    """A request that names every format, and how it came about."""

    request: Request
    record: Mapping[str, Any]
    note: str


@dataclass(frozen=True, slots=True)
class Unit:
    """Matrices that share a format, and what they take in each that they can have."""

    paths: tuple[str, ...]
    sizes_bytes: Mapping[QuantSpec, int]


def allocate_bits(
    source: Source,
    request: Request,
    directory: Path,
    calibration: Calibration,
    folder: Path,
    progress: OnLayers | None = None,
) -> Allocation:
    """Choose formats so that the weights come to the target of `request`.

    Rules of the request hold; what they leave open is chosen.

    Args:
        source: the checkpoint in `directory`.
        request: with a target.
        directory: of the source.
        calibration: texts to measure on, and others to judge by.
        folder: where an interrupted run with the same arguments has kept what it measured.
        progress: told of the stages `measuring` and `comparing sizes`.

    Raises:
        UsageError: the target is out of reach.
        RejectedError: no matrix divides into groups.
    """
    target = request.target
    assert target is not None
    report = progress or (lambda stage, done, total: None)
    with Reader(directory) as reader:
        plans = _uniform_plans(source, request, target, reader)
        base = next(iter(plans.values()))
        units = find_units(plans)
        chosen_paths = {path for unit in units for path in unit.paths}
        fixed_bytes = sum(step.size_bytes for step in base.steps if step.path not in chosen_paths)
        target_bytes = target.total_bytes(base.parameters)
        _check_reach(target, units, fixed_bytes, base.parameters)
        predicted = _measure(plans, units, reader, calibration, folder, report)
        divergences = predicted.final
        formats = choose_formats(units, divergences, target_bytes - fixed_bytes)
        plan = _combined(plans, formats)
        rival = _uniform_rival(plans, units, divergences, target_bytes)
        judged: dict[str, float] = {}
        is_rounded = False
        if rival is not None and any(spec != rival for spec in formats.values()):
            comparison = HeldOutComparison(
                SourceWeights(source, reader), directory, calibration,
                partial(report, "comparing sizes"), folder,
            )  # fmt: skip
            candidates = [plan, plans[rival]]
            if plan.calibrates:
                # The trial calibration of both takes as long as the conversion.
                share = _clearly(predicted, formats, rival)
                found, is_rounded = comparison.rounded_first(candidates, share)
            else:
                found = comparison.divergences(candidates)
            judged = dict(zip(("allocated", "uniform"), found, strict=True))
            if judged["uniform"] < judged["allocated"]:
                plan, formats = plans[rival], dict.fromkeys(formats, rival)
    record = {
        "target": str(target),
        "target_bytes": target_bytes,
        "reached_bytes": plan.weight_bytes,
        "reached_bits_per_weight": round(plan.bits_per_weight, 6),
        "uniform": str(rival) if rival else None,
        "held_out_kl": judged if judged and calibration.judged.held_out else None,
        "held_out_codes": ("rounded" if is_rounded else "final") if judged else None,
        "modules": {
            path: {
                "bits": spec.bits,
                "group_size": spec.group_size,
                "predicted_kl": float(f"{divergences[path][spec]:.4g}"),
                "predicted_kl_by_bits": {
                    str(other.bits): float(f"{divergences[path][other]:.4g}")
                    for other in divergences[path]
                    if other.group_size == spec.group_size
                },
            }
            for path, spec in formats.items()
        },
    }
    where = _where(calibration.judged.held_out, is_rounded)
    note = _note(target, plan, rival, judged, where)
    return allocated(request, record, note)


def allocated(request: Request, record: Mapping[str, Any], note: str) -> Allocation:
    """`request` with a rule for each format that was chosen, instead of its target."""
    rules = tuple(
        Rule(path, QuantSpec(module["bits"], module["group_size"]), str(request.target))
        for path, module in record["modules"].items()
    )
    return Allocation(replace(request, target=None, rules=request.rules + rules), record, note)


def kept_bytes(config: ModelConfig, tokens: int, codes_bytes: int) -> int:
    """Most that `allocate_bits` has on disk.

    Args:
        config: of the model.
        tokens: of the calibration windows.
        codes_bytes: what calibrated codes of the whole model take, 0 where there are none.
    """
    measured = min(tokens, WINDOWS * WINDOW_TOKENS)
    # Every residual stream, and two gradients.
    traced = 4 * measured * (config.hidden_size * (config.num_hidden_layers + 3) + 2)
    return traced + held_out_comparison.kept_bytes(config, codes_bytes)


def find_units(plans: Plans) -> list[Unit]:
    """The matrices whose format is open, q, k and v of a layer together."""
    sizes: dict[str, dict[QuantSpec, int]] = {}
    for spec, plan in plans.items():
        for step in plan.steps:
            if step.spec == spec:
                sizes.setdefault(step.path, {})[spec] = step.size_bytes
    members: dict[str, list[str]] = {}
    for path, found in sizes.items():
        # One format in all plans is a rule of the user's.
        if len(found) > 1:
            members.setdefault(_JOINED.sub(".qkv", path), []).append(path)
    units = []
    for paths in members.values():
        shared = [spec for spec in plans if all(spec in sizes[path] for path in paths)]
        units.append(Unit(tuple(paths), {s: sum(sizes[path][s] for path in paths) for s in shared}))
    return units


def choose_formats(
    units: Sequence[Unit], divergences: Divergences, most_bytes: int
) -> dict[str, QuantSpec]:
    """The format of each matrix, for the least divergence in `most_bytes` or at most 1 % less.

    Where no choice comes that near, the size is the nearest one below `most_bytes`.

    Raises:
        ValueError: not even the smallest formats fit.
    """
    formats = [list(unit.sizes_bytes) for unit in units]
    choices = [
        [
            Choice(unit.sizes_bytes[spec], sum(divergences[path][spec] for path in unit.paths))
            for spec in unit.sizes_bytes
        ]
        for unit in units
    ]
    chosen = allocate(choices, most_bytes, math.ceil(most_bytes * (1 - TOLERANCE)))
    return {
        path: formats[number][index]
        for number, index in enumerate(chosen)
        for path in units[number].paths
    }


def _uniform_plans(source: Source, request: Request, target: Target, reader: Reader) -> Plans:
    plans: dict[QuantSpec, Plan] = {}
    groups = (target.group_size,) if target.group_size is not None else GROUP_SIZES
    for spec in (QuantSpec(bits, group) for group in groups for bits in AFFINE_BITS):
        uniform = replace(request, target=None, default=spec)
        try:
            plan = make_plan(source, uniform)
        except RejectedError:
            if spec == QuantSpec(AFFINE_BITS[-1], groups[-1]) and not plans:
                raise
            continue
        grids = find_grids(plan, reader)
        plans[spec] = make_plan(source, uniform, grids=grids) if grids else plan
    return plans


def _check_reach(target: Target, units: Sequence[Unit], fixed_bytes: int, parameters: int) -> None:
    wanted = target.total_bytes(parameters)
    ends = [
        fixed_bytes + sum(end(unit.sizes_bytes.values()) for unit in units) for end in (min, max)
    ]
    if wanted < ends[0] or wanted > ends[1] * (1 + TOLERANCE):
        low, high = (8 * size / parameters for size in ends)
        raise UsageError(
            f"{target}: out of reach; this model takes from {low:.2f} to {high:.2f} bits per "
            f"weight, {format_bytes(ends[0], round_up=True)} to {format_bytes(ends[1])}"
        )


def _measure(
    plans: Plans,
    units: Sequence[Unit],
    reader: Reader,
    calibration: Calibration,
    folder: Path,
    report: OnLayers,
) -> Prediction:
    base = next(iter(plans.values()))
    depth = base.source.config.num_hidden_layers
    specs = {path: tuple(unit.sizes_bytes) for unit in units for path in unit.paths}
    roundings: dict[str, dict[QuantSpec, Rounding]] = {path: {} for path in specs}
    with_gptq = set()
    for spec, plan in plans.items():
        for step in plan.steps:
            if spec in specs.get(step.path, ()):
                roundings[step.path][spec] = (
                    (lambda weight, _: weight)
                    if step.transform == "grid"
                    else rounding_of(step, search.ROUGH)
                )
                if step.method == "gptq":
                    with_gptq.add(step.path)
    return predict_divergences(
        unscaled_weights(base, reader), roundings, spread(calibration.sample.windows, WINDOWS),
        folder, with_gptq, base.dtype, lambda done: report("measuring", done, 2 * depth),
    )  # fmt: skip


def _combined(plans: Plans, formats: Mapping[str, QuantSpec]) -> Plan:
    """The uniform plans' steps for the formats of an allocation; its files are not its own."""
    base = next(iter(plans.values()))
    steps = {
        step.path: step
        for spec, plan in plans.items()
        for step in plan.steps
        if formats.get(step.path) == spec
    }
    return replace(base, steps=tuple(steps.get(step.path, step) for step in base.steps))


def _uniform_rival(
    plans: Plans, units: Sequence[Unit], divergences: Divergences, target_bytes: int
) -> QuantSpec | None:
    """The uniform format that stays within the target and promises most."""

    def divergence(spec: QuantSpec) -> float:
        return sum(divergences[path][spec] for unit in units for path in unit.paths)

    fitting = [
        spec
        for spec, plan in plans.items()
        if plan.weight_bytes <= target_bytes and all(spec in unit.sizes_bytes for unit in units)
    ]
    return min(fitting, key=divergence, default=None)


def _clearly(predicted: Prediction, formats: Mapping[str, QuantSpec], rival: QuantSpec) -> float:
    """The most that an allocation may have of the uniform width's divergence, both rounded.

    Then it is expected to have at most `CLEARLY` of it, both calibrated: calibration gains more in
    some matrices than in others, and so more with one choice of formats than with another, which
    was measured. At most 1: one that loses when rounded has to be seen calibrated.
    """

    def ratio(divergences: Divergences) -> float:
        chosen = sum(divergences[path][spec] for path, spec in formats.items())
        everywhere = sum(divergences[path][rival] for path in formats)
        return chosen / everywhere if everywhere > 0 else 1.0

    final, rounded = ratio(predicted.final), ratio(predicted.rounded)
    return min(1.0, CLEARLY * rounded / final) if final > 0 else 1.0


def _where(held_out: bool, is_rounded: bool) -> str:
    text = "on texts held out"
    if not held_out:
        text = "on the text it was measured on, too short to divide,"
    return f"{text} and before calibration" if is_rounded else text


def _note(
    target: Target, plan: Plan, rival: QuantSpec | None, judged: Mapping[str, float], where: str
) -> str:
    text = f"{target}: {plan.bits_per_weight:.3f} bits per weight, {plan.weight_bytes:,} bytes"
    if not judged:
        return text
    kept = "the allocation" if judged["allocated"] <= judged["uniform"] else "that uniform width"
    return (
        f"{text}; {where} the allocation's mean divergence is "
        f"{judged['allocated']:.4g}, that of {rival} everywhere {judged['uniform']:.4g}: "
        f"{kept} is taken"
    )
