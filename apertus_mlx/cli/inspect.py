"""`apertus-mlx inspect`: what a checkpoint is, from its config and headers alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from apertus_mlx.cli import options
from apertus_mlx.cli.output import print_report
from apertus_mlx.generation.options import Offline, Revision
from apertus_mlx.system.sizes import format_bytes


def inspect(
    model: options.ModelArgument = None,
    *,
    revision: Revision = None,
    offline: Offline = False,
    json: options.JsonOption = False,
) -> None:
    """Show geometry, size, quantization, context and control tokens of a checkpoint."""
    from apertus_mlx.checkpoint.inspection import inspect_checkpoint
    from apertus_mlx.cli.model_source import locate_model

    report = inspect_checkpoint(locate_model(model, revision, offline))
    print_report(json, lambda: report, lambda: _words(report))


def _words(report: Mapping[str, Any]) -> Iterator[str]:
    for key, value in report.items():
        if value == {}:
            continue
        if isinstance(value, dict):
            yield f"{_label(key)}:"
            for name, inner in value.items():
                yield f"  {name}: {_shown(name, inner)}"
        else:
            yield f"{_label(key)}: {_shown(key, value)}"


def _label(key: str) -> str:
    return key.removesuffix("_bytes").replace("_", " ")


def _shown(key: str, value: Any) -> str:
    if value is None:
        return "-"
    if key.endswith("_bytes"):
        return f"{format_bytes(value)} ({value:,} bytes)"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and value >= 10_000:
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "-"
    return str(value)
