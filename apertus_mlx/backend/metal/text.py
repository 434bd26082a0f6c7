"""Metal source files made into the text of one specialisation."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import mlx.core as mx

from apertus_mlx.backend.metal.kernel import Kernel, KernelText

SOURCES = Path(__file__).with_name("sources")
Constant = int | float | mx.Dtype

# What MLX's own signatures call the types.
TYPE_NAMES = {mx.float32: "float", mx.float16: "float16_t", mx.bfloat16: "bfloat16_t"}
UNIT_ROUNDOFF = {mx.float32: 2.0**-24, mx.float16: 2.0**-11, mx.bfloat16: 2.0**-8}


def specialised(
    kernel: Kernel,
    inputs: Sequence[str],
    outputs: Sequence[str],
    source: str,
    files: Sequence[str],
    constants: str,
) -> KernelText:
    """The text of `kernel`, under a name that Metal accepts and that is as unique as its key.

    Args:
        kernel: has the constants as attributes.
        inputs: names of its inputs.
        outputs: names of its outputs.
        source: its body.
        files: names of files in `sources` without suffix, in the order they need each other.
        constants: what these call its attributes, in capitals, or `T` for its type.
    """
    names = {name: "dtype" if name == "T" else name.lower() for name in constants.split()}
    lines = [_definition(name, getattr(kernel, own)) for name, own in names.items()]
    header = "\n".join(["namespace apertus {", *lines, "}", *map(_compact, files), ""])
    name = re.sub(r"\W", "_", kernel.key)
    return KernelText(name, tuple(inputs), tuple(outputs), source.strip("\n"), header)


def type_key(dtype: mx.Dtype) -> str:
    """How keys of kernels spell a type."""
    return str(dtype).removeprefix("mlx.core.")


def _definition(name: str, value: Constant) -> str:
    if isinstance(value, mx.Dtype):
        return f"using {name} = {TYPE_NAMES[value]};"
    if isinstance(value, float) or name == "EPS":
        return f"constexpr constant float {name} = {float(value)!r}f;"
    return f"constexpr constant int {name} = {value};"


@cache
def _compact(file: str) -> str:
    """A source without comments and empty lines: MLX hashes the text at every call."""
    text = re.sub(r"//.*", "", (SOURCES / f"{file}.metal").read_text(encoding="utf-8"))
    return "\n".join(line.rstrip() for line in text.splitlines() if line.strip())
