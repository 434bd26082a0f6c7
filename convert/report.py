"""Plans and results in words: the table of `--plan`, its JSON form, and the default name."""

from __future__ import annotations

import re
import statistics
from pathlib import Path
from typing import Any

from apertus_mlx.convert.plan.plan import DTYPE_NAMES, Plan, Step
from apertus_mlx.convert.plan.policy import Request
from apertus_mlx.convert.transforms import names as transforms
from apertus_mlx.convert.vocabulary.choice import Cut
from apertus_mlx.convert.write.manifest import MANIFEST
from apertus_mlx.system.sizes import counted

_LAYER = re.compile(r"\.layers\.\d+\.")
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")


def default_name(source_name: str, request: Request) -> str:
    """The output folder's name where the user gives none: `<source>-MLX[-4bit]`."""
    base = _UNSAFE.sub("-", source_name.rsplit("/", 1)[-1]).strip(".-") or "model"
    suffix = ""
    if request.target is not None:
        suffix = f"-{request.target.name}"
    elif request.default is not None:
        spec = request.default
        suffix = f"-{spec.bits}bit" if spec.mode == "affine" else f"-{spec.mode}"
    elif request.rules:
        suffix = "-mixed"
    elif request.dequantize:
        suffix = "-plain"
    if request.vocab is not None:
        suffix += f"-vocab{request.vocab}"
    elif request.vocab_for:
        suffix += "-own-vocab"
    return f"{base}-MLX{suffix}"


def plan_rows(
    plan: Plan, disk_bytes: int | None = None, minutes: float | None = None
) -> tuple[list[str], list[list[str]], list[str]]:
    """Header, rows and closing lines of the table: equal modules of all layers in one row.

    Args:
        plan: to show.
        disk_bytes: the most that lies on disk until the output is done, where that is known.
        minutes: that calibration and tuning take, where that is known.
    """
    groups: dict[tuple[str, str, str, str], list[Step]] = {}
    for step in plan.steps:
        shape = step.outputs[0].shape
        if step.matrix is not None:
            shape = (shape[0], step.columns)
        key = (
            _LAYER.sub(".layers.*.", step.path),
            "x".join(map(str, shape)) or "scalar",
            _verbs(step),
            str(step.spec) if step.spec else DTYPE_NAMES[step.dtype],
        )
        groups.setdefault(key, []).append(step)
    rows = [
        [name, str(len(steps)), shape, transform, form, f"{sum(s.size_bytes for s in steps):,}"]
        for (name, shape, transform, form), steps in groups.items()
    ]
    lines = [
        "",
        f"source            {plan.source.name} ({plan.source.format})",
        f"output            {plan.weight_bytes:,} bytes of weights in "
        f"{counted(len(plan.files), 'file')}",
        f"bits per weight   {plan.bits_per_weight:.3f}",
        f"peak memory       about {plan.peak_memory_bytes:,} bytes",
        *([] if disk_bytes is None else [f"most on disk      about {disk_bytes:,} bytes"]),
        *([] if minutes is None else [f"calibration       about {_duration(minutes)} here"]),
        *(f"note              {note}" for note in plan.notes),
    ]
    header = ["module", "count", "shape", "transform", "form", "bytes"]
    return header, rows, lines


def inflation_rows(cut: Cut) -> tuple[list[str], list[list[str]]]:
    """Header and rows of what texts take with a cut vocabulary, the most costly language first."""
    found = sorted(cut.inflation, key=lambda one: -one.factor)
    rows = [
        [one.language, f"{one.before:,}", f"{one.after:,}", f"{one.factor:.3f}"] for one in found
    ]
    middle = statistics.median(one.factor for one in found) if found else 1.0
    rows.append(["median", "", "", f"{middle:.3f}"])
    return ["language", "tokens before", "after", "factor"], rows


def plan_as_json(plan: Plan, source: str, commit: str | None) -> dict[str, Any]:
    """Everything that a plan says, per tensor."""
    return {
        "source": source,
        "commit": commit,
        "source_format": plan.source.format,
        "source_bytes": plan.source_bytes,
        "output_bytes": plan.weight_bytes,
        "parameters": plan.parameters,
        "bits_per_weight": plan.bits_per_weight,
        "peak_memory_bytes": plan.peak_memory_bytes,
        "dtype": DTYPE_NAMES[plan.dtype],
        "transforms": transforms.record(plan.request, plan.source.config),
        "files": [{"name": file.name, "size_bytes": file.size_bytes} for file in plan.files],
        "notes": list(plan.notes),
        "dropped": dict(plan.source.dropped),
        "modules": [_step_as_json(step) for step in plan.steps],
    }


def summary(plan: Plan, source: str, commit: str | None, target: Path) -> dict[str, Any]:
    """What `convert --json` prints at the end."""
    kept = ("output_bytes", "parameters", "bits_per_weight", "transforms", "notes")
    figures = plan_as_json(plan, source, commit)
    return {
        "output": str(target),
        "manifest": str(target / MANIFEST),
        "source": source,
        "commit": commit,
        **{key: figures[key] for key in kept},
    }


def _duration(minutes: float) -> str:
    if minutes < 1:
        return "a minute"
    return f"{minutes:.0f} minutes" if minutes < 120 else f"{minutes / 60:.0f} hours"


def _verbs(step: Step) -> str:
    """What is done to a tensor."""
    basis_changes = "change basis, " if step.changes_basis else ""
    method = f", {step.method}" if step.method != "rtn" else ""
    return f"{basis_changes}{step.transform}{method}"


def _step_as_json(step: Step) -> dict[str, Any]:
    spec = step.spec
    return {
        "module": step.path,
        "transform": step.transform,
        "changes_basis": step.changes_basis,
        "method": step.method if step.transform in ("quantize", "requantize") else None,
        "sources": [tensor.name for tensor in step.source_tensors],
        "bits": spec.bits if spec else None,
        "group_size": spec.group_size if spec else None,
        "mode": spec.mode if spec else None,
        "unquantized_because": step.reason,
        "loss": step.loss,
        "outputs": [
            {
                "name": tensor.name,
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "size_bytes": tensor.size_bytes,
                "file": tensor.file,
            }
            for tensor in step.outputs
        ],
    }
