"""Options that several commands share, so that they read and behave the same everywhere."""

from __future__ import annotations

import enum
from typing import Annotated

import typer


class DType(enum.StrEnum):
    """Types to compute in."""

    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


class Compute(enum.StrEnum):
    """What computes."""

    AUTO = "auto"
    MLX = "mlx"
    CPU = "cpu"


class Precision(enum.StrEnum):
    """What activations are rounded to inside matrix products on the CPU."""

    AUTO = "auto"
    FLOAT32 = "float32"
    INT8 = "int8"


ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model", "-m", help="Model folder or Hub id (org/name); default: the embedded model."
    ),
]
RevisionOption = Annotated[
    str | None, typer.Option("--revision", help="Branch, tag or commit of a Hub id.")
]
OfflineOption = Annotated[
    bool, typer.Option("--offline", help="Use only what is already on this machine.")
]
SystemOption = Annotated[str | None, typer.Option("--system", "-s", help="System message.")]
ThinkOption = Annotated[
    bool, typer.Option("--think", help="Let the model deliberate first (shown on stderr).")
]
MaxTokensOption = Annotated[
    int, typer.Option("--max-tokens", "-n", min=1, max=2**31 - 1, help="Most tokens to generate.")
]
TemperatureOption = Annotated[
    float | None,
    typer.Option(
        "--temperature", "--temp", "-t", help="0 takes the likeliest token; default: the model's."
    ),
]
TopPOption = Annotated[
    float | None, typer.Option("--top-p", help="Keep the likeliest tokens up to this mass.")
]
TopKOption = Annotated[
    int | None, typer.Option("--top-k", help="Keep this many tokens; 0 keeps all.")
]
MinPOption = Annotated[
    float | None, typer.Option("--min-p", help="Drop tokens below this share of the likeliest.")
]
RepetitionPenaltyOption = Annotated[
    float | None, typer.Option("--repetition-penalty", help="Above 1 discourages repetition.")
]
SeedOption = Annotated[int | None, typer.Option("--seed", help="Same seed, same text.")]
StopOption = Annotated[
    list[str] | None, typer.Option("--stop", help="End the answer before this text; repeatable.")
]
DTypeOption = Annotated[
    DType | None, typer.Option("--dtype", help="Type to compute in; default: what suits.")
]
ComputeOption = Annotated[
    Compute, typer.Option("--compute", help="mlx, or cpu where MLX has no GPU; auto chooses.")
]
PrecisionOption = Annotated[
    Precision,
    typer.Option(
        "--precision",
        help="Type of activations on the CPU; auto: int8 with weights of few bits, else float32.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
