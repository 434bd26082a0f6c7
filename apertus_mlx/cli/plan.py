"""`apertus-mlx plan`: what a model takes and what fits, from its config and headers alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apertus_mlx.cli import cache_options, options
from apertus_mlx.cli.output import format_bytes, note, print_data, print_json, print_table

if TYPE_CHECKING:
    from apertus_mlx.memory import Subject


def plan(
    model: Annotated[
        str | None, typer.Argument(help="Model folder or Hub id; default: the embedded model.")
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            "--device",
            help="iphone-15-pro, m1-8gb, m4-pro-24gb, ... or a size as 6GB; default: this machine.",
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option("--context", min=1, help="Tokens of prompt and answer; default: 4096."),
    ] = None,
    kv_bits: cache_options.KvBitsOption = None,
    kv_bits_v: cache_options.KvBitsVOption = None,
    max_kv: cache_options.MaxKvOption = None,
    kv_sink: cache_options.KvSinkOption = None,
    kv_rotate: cache_options.KvRotateOption = None,
    prefill_step: cache_options.PrefillStepOption = None,
    revision: options.RevisionOption = None,
    offline: options.OfflineOption = False,
    json: options.JsonOption = False,
) -> None:
    """Show what MODEL takes in memory, whether it fits a device, and the best settings there.

    A Hub id is planned from its headers; no weights are downloaded.
    """
    from apertus_mlx.memory.report import make_report

    form = cache_options.read_cache_form(kv_bits, kv_bits_v, max_kv, kv_sink, kv_rotate)
    target = _device(device)
    subject = _subject(model, revision, offline)
    report = make_report(
        subject, target, context, form, prefill_step, _on_gpu(device), _cpu_precision(device)
    )
    if json:
        print_json(report)
    else:
        _print_report(report)


def _device(name: str | None) -> Any:
    from apertus_mlx.memory import Device, parse_device

    if name is not None:
        return parse_device(name)
    from apertus_mlx.backend.hardware import available_bytes

    return Device("this machine", available_bytes())


def _on_gpu(device: str | None) -> bool:
    """Every device by name is Apple's; only this machine may lack a GPU."""
    if device is not None:
        return True
    from apertus_mlx.backend.hardware import has_gpu

    return has_gpu()


def _cpu_precision(device: str | None) -> str | None:
    """The precision of the CPU path, if it is what runs models on this machine."""
    if device is not None:
        return None
    from apertus_mlx.backend.choose import uses_cpu

    return "auto" if uses_cpu("auto", None) else None


def _subject(model: str | None, revision: str | None, offline: bool) -> Subject:
    from apertus_mlx.memory import local_subject, remote_subject

    if model is not None and not offline:
        from apertus_mlx.hub import fetch_headers, is_repo_id

        if is_repo_id(model) and not Path(model).is_dir():
            note(f"{model}: reading config and headers")
            remote = fetch_headers(model, revision or "main")
            headers = {
                file: (header.header_json, header.file_size)
                for file, header in remote.headers.items()
            }
            return remote_subject(model, remote.files, headers)
    from apertus_mlx.cli.model_source import locate_model

    return local_subject(locate_model(model, revision, offline), model)


def _print_report(report: dict[str, Any]) -> None:
    print_data(
        f"{report['model']}: {report['parameters'] / 1e6:.0f} M parameters, "
        f"files {format_bytes(report['file_bytes'])} ({report['file_bytes']:,} bytes)"
    )
    print_data(
        f"{report['device']}: {format_bytes(report['limit_bytes'])} for the process; "
        f"{report['context']} tokens of context"
    )
    print_data("")
    header = ["cache", "KV/token", "weights", "KV", "prefill", "logits", "peak", "fits", "max ctx"]
    with_speed = any(row["decode_tokens_per_s"] is not None for row in report["forms"])
    header += ["tok/s *"] if with_speed else []
    rows = []
    for row in report["forms"]:
        cells = [
            f"{row['form']}, prefill step {row['prefill_step']}",
            format_bytes(row["kv_bytes_per_token"]),
            format_bytes(row["weights_bytes"]),
            format_bytes(row["kv_bytes"]),
            format_bytes(row["prefill_bytes"]),
            format_bytes(row["logits_bytes"]),
            format_bytes(row["total_bytes"]),
            "yes" if row["fits"] else "no",
            str(row["largest_context"]),
        ]
        rows.append([*cells, f"{row['decode_tokens_per_s']:.0f}"] if with_speed else cells)
    print_table(header, rows)
    print_data("")
    print_data(report["advice"])
    if with_speed:
        print_data(f"* {report['speed_formula']}")
