"""Rotary position embedding as configs write it: three spellings, one value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from apertus_mlx.checkpoint.config_keys import KeyReader
from apertus_mlx.errors import RejectedError

RopeType = Literal["default", "linear", "llama3"]

# With a base up to 1 no pair turns more slowly than a radian for each token.
MIN_THETA, MAX_THETA = 1.0, 1e12
# Of positions; below it those of a long context are beyond what float32 tells apart.
FACTOR_RANGE = 1e-3, 1e6
MAX_CONTEXT = 2**24

FACTORS: dict[RopeType, tuple[str, ...]] = {
    "default": (), "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}  # fmt: skip
_ORIGINAL = "original_max_position_embeddings"
# What stands at the top level where an exporter has dissolved `rope_parameters`.
_FLAT_KEYS = ("rope_type", *FACTORS["llama3"], _ORIGINAL)


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding: base and, for `linear` and `llama3`, how it is scaled."""

    theta: float
    type: RopeType = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


def parse_rope(keys: KeyReader, values: Mapping[str, Any], name: str) -> Rope:
    """Rope in any spelling; where there are several they must agree.

    transformers 5 writes `rope_parameters`, transformers 4 `rope_theta` and `rope_scaling`, and
    AutoRound's MLX export dissolves `rope_parameters` into the keys of the model.

    Raises:
        RejectedError: a type that is not implemented, no base, or two spellings that disagree.
    """
    flat_theta = keys.optional_number("rope_theta", MIN_THETA, MAX_THETA)
    new = keys.mapping("rope_parameters")
    old = keys.mapping("rope_scaling")
    flat = None
    if values.get("rope_type") is not None:
        flat = {key: values[key] for key in _FLAT_KEYS if key in values}
        keys.ignore(flat.keys())
    found = {"rope_parameters": new, "rope_scaling": old, "rope_type": flat}
    blocks = {key: block for key, block in found.items() if block is not None}
    readings = {
        key: _parse_block(block, flat_theta, f"{name}: {key}")
        for key, block in (blocks or {"rope_scaling": {}}).items()
    }
    (first, rope), *others = readings.items()
    for other, reading in others:
        if reading != rope:
            raise RejectedError(f"{name}: {first} and {other} disagree")
    if flat_theta is not None and rope.theta != flat_theta:
        raise RejectedError(
            f"{name}: rope_theta {flat_theta} and {first}.rope_theta {rope.theta} disagree"
        )
    return rope


def _parse_block(block: Mapping[str, Any], flat_theta: float | None, name: str) -> Rope:
    keys = KeyReader(block, name)
    kind: Any = keys.either_text("rope_type", "type") or "default"
    if kind not in FACTORS:
        raise RejectedError(
            f"{name}: rope_type: {kind[:60]!r} is not implemented; "
            "Apertus uses default, linear or llama3"
        )
    theta = keys.optional_number("rope_theta", MIN_THETA, MAX_THETA) or flat_theta
    if theta is None:
        raise RejectedError(f"{name}: rope_theta: missing; the rotary base cannot be guessed")
    # transformers keeps a factor of 1 beside the default type.
    if kind == "default" and keys.optional_number("factor", *FACTOR_RANGE) not in (None, 1):
        raise RejectedError(f"{name}: factor: has no meaning without a rope_type")
    if keys.optional_number("partial_rotary_factor", 0, 1) not in (None, 1):
        raise RejectedError(f"{name}: partial_rotary_factor: only 1 is implemented")
    scaling: dict[str, Any] = {key: keys.number(key, *FACTOR_RANGE) for key in FACTORS[kind]}
    if kind == "llama3":
        scaling[_ORIGINAL] = keys.integer(_ORIGINAL, 1, MAX_CONTEXT)
        if scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
            raise RejectedError(f"{name}: high_freq_factor: must exceed low_freq_factor")
    else:  # the other types scale by nothing that depends on it
        keys.ignore({_ORIGINAL})
    keys.refuse_unread()
    return Rope(theta, kind, **scaling)
