"""Metal source files made into the text of one specialisation."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import mlx.core as mx

SOURCES = Path(__file__).with_name("sources")
Constant = int | float | mx.Dtype

# What MLX's own signatures call the types.
TYPE_NAMES = {mx.float32: "float", mx.float16: "float16_t", mx.bfloat16: "bfloat16_t"}
UNIT_ROUNDOFF = {mx.float32: 2.0**-24, mx.float16: 2.0**-11, mx.bfloat16: 2.0**-8}


def header(files: tuple[str, ...], constants: Mapping[str, Constant]) -> str:
    """Constants of a specialisation, then the functions that use them.

    Args:
        files: names of files in `sources` without suffix, in the order they need each other.
        constants: int, float or type, by the name that the files give it.
    """
    lines = [_definition(name, value) for name, value in constants.items()]
    return "\n".join(["namespace apertus {", *lines, "}", *map(_compact, files), ""])


def name(key: str) -> str:
    """A name for a kernel that Metal accepts, as unique as `key`."""
    return re.sub(r"\W", "_", key)


def type_key(dtype: mx.Dtype) -> str:
    """How keys of kernels spell a type."""
    return str(dtype).removeprefix("mlx.core.")


def _definition(name: str, value: Constant) -> str:
    if isinstance(value, mx.Dtype):
        return f"using {name} = {TYPE_NAMES[value]};"
    if isinstance(value, float):
        return f"constexpr constant float {name} = {value!r}f;"
    return f"constexpr constant int {name} = {value};"


@cache
def _compact(file: str) -> str:
    """A source without comments and empty lines: MLX hashes the text at every call."""
    text = re.sub(r"//.*", "", (SOURCES / f"{file}.metal").read_text(encoding="utf-8"))
    return "\n".join(line.rstrip() for line in text.splitlines() if line.strip())
