"""`apertus-mlx convert`: a checkpoint becomes MLX weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from apertus_mlx.cli.options import DType, JsonOption, OfflineOption, RevisionOption
from apertus_mlx.cli.output import (
    byte_progress,
    format_bytes,
    layer_progress,
    note,
    print_data,
    print_json,
    print_table,
)
from apertus_mlx.errors import UsageError
from apertus_mlx.quant.spec import AFFINE_BITS, AFFINE_GROUP_SIZES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from apertus_mlx.convert.job import Job
    from apertus_mlx.convert.plan.plan import Plan
    from apertus_mlx.convert.plan.policy import Method, Request
    from apertus_mlx.memory import Device

EMBEDDED_NAME = "apertus-demo"


def convert(
    source: Annotated[
        str | None, typer.Argument(help="Model folder or Hub id; default: the embedded model.")
    ] = None,
    out: Annotated[
        Path | None, typer.Argument(help="Output folder; default: a name from the source, here.")
    ] = None,
    bits: Annotated[
        str | None, typer.Option("--bits", "-b", help="Bits per weight: 2, 3, 4, 5, 6 or 8.")
    ] = None,
    group_size: Annotated[
        str | None, typer.Option("--group-size", "-g", help="Weights per scale: 32, 64 or 128.")
    ] = None,
    mode: Annotated[
        str | None, typer.Option("--mode", help="affine (default), mxfp4, mxfp8 or nvfp4.")
    ] = None,
    embed_bits: Annotated[
        str | None, typer.Option("--embed-bits", help="Bits of the embedding.")
    ] = None,
    head_bits: Annotated[
        str | None, typer.Option("--head-bits", help="Bits of the head, where it is its own.")
    ] = None,
    target_bpw: Annotated[
        str | None,
        typer.Option("--target-bpw", help="Bits per weight in all; spent where they matter most."),
    ] = None,
    target_size: Annotated[
        str | None,
        typer.Option("--target-size", help="The same by the size of all weights: 300MB, 1.2GB."),
    ] = None,
    rules: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="PATTERN=BITS[:GROUP]",
            help="Format of the modules that match, e.g. '*.down_proj=6'; none keeps them plain.",
        ),
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option("--recipe", help="TOML or JSON file with formats per module.")
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            "--method", help="rtn rounds, search finds the best scales, gptq calibrates on text."
        ),
    ] = "rtn",
    smooth: Annotated[
        bool,
        typer.Option(
            "--smooth", help="Scale columns where calibration shows that it spares errors."
        ),
    ] = False,
    rotate: Annotated[
        bool,
        typer.Option("--rotate", help="Spread outliers: another basis for residual and values."),
    ] = False,
    calibration: Annotated[
        list[Path] | None,
        typer.Option(
            "--calibration",
            help="Text, JSONL or chat file, or folder, for gptq, --smooth, --target-*.",
        ),
    ] = None,
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="Turn quantized weights into plain ones.")
    ] = False,
    requantize: Annotated[
        bool, typer.Option("--requantize", help="Quantize quantized weights again, with a loss.")
    ] = False,
    dtype: Annotated[
        DType | None, typer.Option("--dtype", help="Type of everything that is not codes.")
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Show what would be done, and stop.")
    ] = False,
    json: JsonOption = False,
    device: Annotated[
        str | None,
        typer.Option("--device", help="Refuse what would not fit it: iphone-15-pro, 6GB, ..."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an interrupted conversion.")
    ] = False,
    revision: RevisionOption = None,
    offline: OfflineOption = False,
    allow_untied_head: Annotated[
        bool,
        typer.Option("--allow-untied-head", help="Keep a head that differs from a tied embedding."),
    ] = False,
    allow_nonfinite: Annotated[
        bool, typer.Option("--allow-nonfinite", help="Copy NaN and infinity (not when quantizing).")
    ] = False,
) -> None:
    """Convert SOURCE to MLX weights in the folder OUT, quantized where --bits is given."""
    from apertus_mlx.cli.resumable import resumable
    from apertus_mlx.convert.job import convert as run
    from apertus_mlx.convert.report import plan_as_json, plan_rows, summary
    from apertus_mlx.convert.write.workspace import check_target, partial_path

    request = _request(
        bits, group_size, mode, embed_bits, head_bits, rules or [], recipe,
        target_bpw=target_bpw, target_size=target_size, method=method, smooth=smooth,
        rotate=rotate, dequantize=dequantize, requantize=requantize, dtype=dtype,
        allow_untied_head=allow_untied_head, allow_nonfinite=allow_nonfinite,
    )  # fmt: skip
    if calibration and method != "gptq" and not smooth and request.target is None:
        raise UsageError("--calibration: only --method gptq, --smooth and targets use it")
    target_device = _read_device(device)
    if plan:
        planned, name, commit = _plan_only(
            source, revision, offline, request, calibration or [], out, resume
        )
        _require_fit(planned, target_device)
        if json:
            print_json(plan_as_json(planned, name, commit))
        else:
            header, rows, lines = plan_rows(planned)
            print_table(header, rows)
            for line in lines:
                print_data(line)
        return
    if out is not None and not (resume and partial_path(out).is_dir()):
        check_target(out, None)
    job, target = _prepare(source, revision, offline, request, calibration or [], out, resume)
    _require_fit(job.plan, target_device)
    for line in job.plan.notes:
        note(line)
    if job.asks_for_code:
        note(f"config.json asks for code ({', '.join(job.asks_for_code)}); never run, not copied")
    with (
        resumable(),
        layer_progress("calibrating") as on_layer,
        byte_progress("converting", job.plan.source_bytes) as update,
    ):
        run(job, target, resume, update, on_layer)
    note(
        f"{format_bytes(job.plan.source_bytes)} -> {format_bytes(job.plan.weight_bytes)}, "
        f"{job.plan.bits_per_weight:.3f} bits per weight"
    )
    if json:
        print_json(summary(job, target))
    else:
        print_data(str(target))


def _read_device(name: str | None) -> Device | None:
    if name is None:
        return None
    from apertus_mlx.memory import parse_device

    return parse_device(name)


def _require_fit(plan: Plan, device: Device | None) -> None:
    if device is not None:
        from apertus_mlx.convert.plan.budget import require_fit

        require_fit(plan, device)


def _request(
    bits: str | None,
    group_size: str | None,
    mode: str | None,
    embed_bits: str | None,
    head_bits: str | None,
    rules: list[str],
    recipe: Path | None,
    *,
    target_bpw: str | None,
    target_size: str | None,
    method: str,
    smooth: bool,
    rotate: bool,
    dequantize: bool,
    requantize: bool,
    dtype: DType | None,
    allow_untied_head: bool,
    allow_nonfinite: bool,
) -> Request:
    from apertus_mlx.checkpoint import layout
    from apertus_mlx.convert.plan.plan import CONFIG_DTYPES
    from apertus_mlx.convert.plan.policy import (
        Request,
        Rule,
        make_spec,
        module_rule,
        parse_rule,
        parse_target,
        read_recipe,
    )

    bits_value = _integer(bits, "--bits", AFFINE_BITS)
    group = _integer(group_size, "--group-size", AFFINE_GROUP_SIZES)
    target = parse_target(target_bpw, target_size, group)
    if target is not None and (bits_value is not None or mode is not None or recipe is not None):
        raise UsageError(f"{target}: chooses formats itself; leave out --bits, --mode and --recipe")
    default = None
    found: list[Rule] = []
    if recipe is not None:
        if bits_value is not None or mode is not None or group is not None:
            raise UsageError("--recipe: says bits, group size and mode itself; leave them out")
        default, recipe_rules = read_recipe(recipe)
        found += recipe_rules
    elif bits_value is not None or mode is not None:
        default = make_spec(bits_value, group, mode, "--bits" if mode is None else "--mode")
    elif group is not None and not (embed_bits or head_bits or rules or target):
        raise UsageError("--group-size: give --bits as well")
    for option, value, path in (
        ("--embed-bits", embed_bits, layout.EMBEDDING),
        ("--head-bits", head_bits, layout.HEAD),
    ):
        number = _integer(value, option, AFFINE_BITS)
        if number is not None:
            found.append(module_rule(path, number, group, option))
    found += [parse_rule(rule, group) for rule in rules]
    return Request(
        default,
        tuple(found),
        target,
        method=_method(method),
        smooth=smooth,
        rotate=rotate,
        dequantize=dequantize,
        requantize=requantize,
        dtype=CONFIG_DTYPES[dtype.value] if dtype else None,
        allow_untied_head=allow_untied_head,
        allow_nonfinite=allow_nonfinite,
    )


def _method(text: str) -> Method:
    from apertus_mlx.convert.plan.policy import METHODS

    for method in METHODS:
        if text == method:
            return method
    raise UsageError(f"--method {text[:40]!r}: expected {', '.join(METHODS[:-1])} or {METHODS[-1]}")


def _integer(value: str | None, option: str, allowed: tuple[int, ...]) -> int | None:
    if value is None:
        return None
    if value not in map(str, allowed):
        choices = ", ".join(map(str, allowed[:-1])) + f" or {allowed[-1]}"
        raise UsageError(f"{option} {value[:40]!r}: expected {choices}")
    return int(value)


def _prepare(
    source: str | None,
    revision: str | None,
    offline: bool,
    request: Request,
    calibration: Sequence[Path],
    out: Path | None,
    resume: bool,
) -> tuple[Job, Path]:
    """The job and its output folder; where a size is the target, it is measured for there."""
    from apertus_mlx.cli.resumable import resumable
    from apertus_mlx.convert.job import prepare
    from apertus_mlx.convert.report import default_name
    from apertus_mlx.convert.write.workspace import partial_path

    commit = None
    if source is None:
        from apertus_mlx.demo import model_dir

        note("using the small demonstration model in the package; SOURCE takes a real one")
        folder, name = model_dir(), EMBEDDED_NAME
    else:
        from apertus_mlx.hub import is_repo_id, locate, resolve

        if not Path(source).expanduser().exists() and is_repo_id(source):
            snapshot = resolve(source, revision=revision, offline=offline)
            folder, name, commit = snapshot.directory, source, snapshot.commit
        else:
            folder = locate(source, revision=revision, offline=offline)
            name = folder.resolve().name
    target = out or Path(default_name(name, request))
    partial = partial_path(target)
    earlier = not resume and partial.is_dir()
    with resumable(), layer_progress("measuring") as on_layer:
        job = prepare(
            folder, request, name, commit, calibration_texts=calibration, progress=on_layer,
            target=target, resume=resume,
        )  # fmt: skip
    if earlier and job.is_begun:
        note(f"{partial}: what was measured there for the same request is used")
    return job, target


def _plan_only(
    source: str | None,
    revision: str | None,
    offline: bool,
    request: Request,
    calibration: Sequence[Path],
    out: Path | None,
    resume: bool,
) -> tuple[Plan, str, str | None]:
    """The plan alone; for a Hub id from its headers, before anything is downloaded."""
    from apertus_mlx.convert.write.workspace import partial_path
    from apertus_mlx.hub import is_repo_id

    remote = source is not None and not Path(source).expanduser().exists() and is_repo_id(source)
    if not remote or offline or source is None:
        job, target = _prepare(source, revision, offline, request, calibration, out, resume)
        if job.is_begun:
            note(f"{partial_path(target)}: holds what was measured, for the conversion to use")
        return job.plan, job.source_name, job.commit
    from apertus_mlx.convert.remote import plan_remote
    from apertus_mlx.hub import fetch_headers

    checkpoint = fetch_headers(source, revision or "main")
    return plan_remote(checkpoint, request), source, checkpoint.commit
