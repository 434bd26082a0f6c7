"""Options that several commands share, so that they read and behave the same everywhere."""

from __future__ import annotations

import enum
import functools
import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Annotated, Any

import typer

from apertus_mlx.generation.options import CacheOptions, RunOptions, SamplingOptions


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
DTypeOption = Annotated[
    DType | None, typer.Option("--dtype", help="Type to compute in; default: what suits.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]

# The options of `SamplingOptions`, `CacheOptions` and `RunOptions`, in the order of the help.
_OPTIONS: dict[str, Any] = {
    "max_tokens": Annotated[
        int,
        typer.Option("--max-tokens", "-n", min=1, max=2**31 - 1, help="Most tokens to generate."),
    ],
    "temperature": Annotated[
        float | None,
        typer.Option(
            "--temperature",
            "--temp",
            "-t",
            help="0 takes the likeliest token; default: the model's.",
        ),
    ],
    "top_p": Annotated[
        float | None, typer.Option("--top-p", help="Keep the likeliest tokens up to this mass.")
    ],
    "top_k": Annotated[
        int | None, typer.Option("--top-k", help="Keep this many tokens; 0 keeps all.")
    ],
    "min_p": Annotated[
        float | None, typer.Option("--min-p", help="Drop tokens below this share of the likeliest.")
    ],
    "repetition_penalty": Annotated[
        float | None, typer.Option("--repetition-penalty", help="Above 1 discourages repetition.")
    ],
    "seed": Annotated[int | None, typer.Option("--seed", help="Same seed, same text.")],
    "stop": Annotated[
        list[str] | None,
        typer.Option("--stop", help="End the answer before this text; repeatable."),
    ],
    "dtype": DTypeOption,
    "compute": Annotated[
        Compute, typer.Option("--compute", help="mlx, or cpu where MLX has no GPU; auto chooses.")
    ],
    "precision": Annotated[
        Precision,
        typer.Option(
            "--precision",
            help="Type of activations on the CPU; auto: int8 with weights of few bits, else "
            "float32.",
        ),
    ],
    "kv_bits": Annotated[
        int | None,
        typer.Option(
            "--kv-bits", help="Bits of cached keys and values: 2, 3, 4, 6, 8 or 16 (full)."
        ),
    ],
    "kv_bits_v": Annotated[
        int | None,
        typer.Option("--kv-bits-v", help="Bits of cached values; default: those of keys."),
    ],
    "max_kv": Annotated[
        int | None,
        typer.Option(
            "--max-kv", help="Keep at most this many positions: the first few, the latest."
        ),
    ],
    "kv_sink": Annotated[
        int | None, typer.Option("--kv-sink", help="First positions that always stay; default: 4.")
    ],
    "kv_rotate": Annotated[
        bool | None,
        typer.Option(
            "--kv-rotate/--no-kv-rotate",
            help="Rotate keys before they are quantized; default: where heads allow it.",
        ),
    ],
    "prefill_step": Annotated[
        int | None,
        typer.Option(
            "--prefill-step",
            min=1,
            max=2**20,
            help="Prompt tokens per step; default: 512, or less.",
        ),
    ],
    "memory_limit": Annotated[
        str | None,
        typer.Option(
            "--memory-limit", help="Stay below this, as 1.2GB; default: what the machine can give."
        ),
    ],
    "force": Annotated[
        bool, typer.Option("--force", help="Try even where the memory will not suffice.")
    ],
    "revision": RevisionOption,
    "offline": OfflineOption,
}


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """Give `command` an option for each field of its parameters that are dataclasses of options."""
    signature = inspect.signature(command, eval_str=True)
    parameters, groups = [], {}
    for parameter in signature.parameters.values():
        group = parameter.annotation
        if group not in (SamplingOptions, CacheOptions, RunOptions):
            parameters.append(parameter)
            continue
        groups[parameter.name] = group
        defaults = {field.name: field.default for field in fields(group)}
        for name in _OPTIONS:
            if name in defaults:
                option = parameter.replace(
                    name=name, annotation=_OPTIONS[name], default=defaults[name]
                )
                parameters.append(option)

    @functools.wraps(command)
    def run(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in fields(group)})
        command(**given)

    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return run
