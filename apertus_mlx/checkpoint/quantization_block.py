"""How a config says that weights are quantized: MLX's block, or another format's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from apertus_mlx.checkpoint.config_keys import KeyReader
from apertus_mlx.errors import RejectedError
from apertus_mlx.quant.spec import FLOAT_MODES, QuantSpec

# A method's name, and the block that says how.
Foreign = tuple[str, Mapping[str, Any]]

# Methods whose weights `convert` reads.
CONVERTIBLE = ("compressed-tensors", "gptq", "awq", "auto-round", "fp8")
# Methods that compress plain weights when they are loaded: their block may stand beside such.
AT_LOADING = ("bitsandbytes",)

# What stands beside bits, group size and mode in an MLX block.
_MLX_EXTRAS = frozenset({"quant_method", "linear_class", "quantization_mode"})
_MLX_KEYS = frozenset({"bits", "group_size", "mode"}) | _MLX_EXTRAS
# Methods whose blocks may hold no other keys than MLX's.
_NEVER_MLX = frozenset({*CONVERTIBLE, *AT_LOADING, "intel/auto-round"})
# What MLX takes where affine weights say nothing.
_AFFINE_DEFAULTS = 4, 64


@dataclass(frozen=True, slots=True)
class Quantization:
    """The `quantization` block of an MLX folder: one default and per-module exceptions."""

    default: QuantSpec
    overrides: Mapping[str, QuantSpec | None] = field(default_factory=lambda: MappingProxyType({}))

    def spec_for(self, path: str) -> QuantSpec | None:
        """The format of the module at `path`; None where the block says it stays unquantized."""
        return self.overrides.get(path, self.default)


def parse_quantization(keys: KeyReader, name: str) -> tuple[Quantization | None, Foreign | None]:
    """MLX's `quantization` block, or the block of another format under `quantization_config`.

    Raises:
        RejectedError: a format that MLX has not, an unknown key, a value of a wrong type, or two
            blocks that disagree.
    """
    block = keys.mapping("quantization")
    other = keys.mapping("quantization_config")
    if other is not None:
        KeyReader(other, f"{name}: quantization_config").optional_text("quant_method")
    if block is not None and other is not None and _describes_mlx(block, other):
        other = None
    if block is not None and other is not None and dict(block) != dict(other):
        raise RejectedError(f"{name}: quantization and quantization_config disagree")
    if block is None and other is not None and _is_foreign(other):
        return None, (str(other["quant_method"]).removeprefix("intel/"), other)
    block = block if block is not None else other
    if block is None:
        return None, None
    return _parse_mlx(block, f"{name}: quantization"), None


def unread(name: str, method: str) -> RejectedError:
    """The error for weights of a method that nothing here reads."""
    return RejectedError(
        f"{name}: quantized by {method[:40]!r}, which is not read; use the checkpoint that it was "
        "made from (of a fine-tune: merged in 16 bits), or a compressed-tensors, GPTQ, AWQ or "
        "AutoRound version"
    )


def _is_foreign(block: Mapping[str, Any]) -> bool:
    method = block.get("quant_method")
    if method is None:
        return False
    own = {key for key, value in block.items() if not isinstance(value, dict | bool)}
    return method in _NEVER_MLX or not own <= _MLX_KEYS or not {"bits", "group_size"} <= own


def _describes_mlx(block: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether `other` says in AutoRound's words that the weights are as MLX's `block` says."""
    return other.get("packing_format") == "mlx" and all(
        other.get(key) in (None, block.get(key)) for key in ("bits", "group_size")
    )


def _parse_mlx(block: Mapping[str, Any], name: str) -> Quantization:
    keys = KeyReader(block, name)
    default = _parse_spec(keys, name)
    keys.ignore(_MLX_EXTRAS)
    overrides: dict[str, QuantSpec | None] = {}
    for path, value in block.items():
        if value is False:
            overrides[path] = None
        elif isinstance(value, dict):
            inner = KeyReader(value, f"{name}.{path[:80]}")
            overrides[path] = _parse_spec(inner, f"{name}.{path[:80]}")
            inner.refuse_unread()
        elif value is True:
            overrides[path] = default
        else:
            continue
        keys.ignore({path})
    keys.refuse_unread()
    return Quantization(default, MappingProxyType(overrides))


def _parse_spec(keys: KeyReader, name: str) -> QuantSpec:
    """One format; as in MLX, bits and group size that are absent or null are the mode's own."""
    mode: Any = keys.optional_text("mode") or "affine"
    bits, group_size = FLOAT_MODES.get(mode, _AFFINE_DEFAULTS)
    try:
        return QuantSpec(
            bits=keys.optional_integer("bits", 1, 64) or bits,
            group_size=keys.optional_integer("group_size", 1, 2**20) or group_size,
            mode=mode,
        )
    except ValueError as error:
        raise RejectedError(f"{name}: {error}") from None
