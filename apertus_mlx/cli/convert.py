"""`apertus-mlx convert`: a checkpoint becomes MLX weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from apertus_mlx.cli.options import DType, JsonOption, OfflineOption, RevisionOption
from apertus_mlx.cli.output import Table, print_report
from apertus_mlx.cli.progress import show_progress
from apertus_mlx.errors import UsageError


def convert(
    source: Annotated[
        str | None, typer.Argument(help="Model folder or Hub id; default: the embedded model.")
    ] = None,
    out: Annotated[
        Path | None, typer.Argument(help="Output folder; default: a name from the source, here.")
    ] = None,
    out_option: Annotated[
        Path | None, typer.Option("--out", help="The same as OUT.", show_default=False)
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
        str | None,
        typer.Option("--head-bits", help="Bits of the output head, where it is not the embedding."),
    ] = None,
    target_bpw: Annotated[
        str | None,
        typer.Option(
            "--target-bpw",
            help="Bits per weight over the whole model, spent where they matter most.",
        ),
    ] = None,
    target_size: Annotated[
        str | None,
        typer.Option("--target-size", help="The same as the size of all weights: 300MB, 1.2GB."),
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
            "--smooth",
            help="Scale columns before rounding, where calibration shows a smaller error.",
        ),
    ] = False,
    rotate: Annotated[
        bool,
        typer.Option("--rotate", help="Rotate residual stream and values, which spreads outliers."),
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
    from apertus_mlx.convert.report import plan_rows
    from apertus_mlx.quant.spec import AFFINE_BITS, AFFINE_GROUP_SIZES
    from apertus_mlx.tools import convert_model

    if out is not None and out_option is not None:
        raise UsageError(f"--out {out_option}: the output folder is given twice, {out} as well")
    with resumable(), show_progress() as progress:
        done = convert_model(
            source,
            out or out_option,
            bits=_integer(AFFINE_BITS, bits=bits),
            group_size=_integer(AFFINE_GROUP_SIZES, group_size=group_size),
            mode=mode,
            embed_bits=_integer(AFFINE_BITS, embed_bits=embed_bits),
            head_bits=_integer(AFFINE_BITS, head_bits=head_bits),
            target_bpw=target_bpw,
            target_size=target_size,
            set=rules,
            recipe=recipe,
            method=method,
            smooth=smooth,
            rotate=rotate,
            calibration=calibration,
            dequantize=dequantize,
            requantize=requantize,
            dtype=dtype.value if dtype else None,
            plan=plan,
            device=device,
            resume=resume,
            revision=revision,
            offline=offline,
            allow_untied_head=allow_untied_head,
            allow_nonfinite=allow_nonfinite,
            progress=progress,
        )
    if done.written:
        print_report(json, done.as_json, lambda: [str(done.output)])
    else:
        header, rows, lines = plan_rows(done.plan)
        print_report(json, done.as_json, lambda: [Table(header, rows), *lines])


def _integer(allowed: tuple[int, ...], **option: str | None) -> int | None:
    """The number that the text of an option says."""
    from apertus_mlx.system.arguments import expect_one_of

    expect_one_of([str(number) for number in allowed], **option)
    (text,) = option.values()
    return None if text is None else int(text)
