"""Which weight matrix gets which format: a request, resolved against the modules of a model. Pure.

A rule names modules by path or pattern (`*` matches anything); two rules that give one module
different formats are a mistake, and so is a rule that matches nothing.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from apertus_mlx.checkpoint import layout
from apertus_mlx.errors import UsageError
from apertus_mlx.memory.devices import parse_size
from apertus_mlx.quant.affine import ScaleType
from apertus_mlx.quant.spec import AFFINE_BITS, AFFINE_GROUP_SIZES, FLOAT_MODES, QuantSpec
from apertus_mlx.system.model_files import read_own_file
from apertus_mlx.system.strict_json import parse_object

DEFAULT_GROUP_SIZE = 64
# Rounding to nearest as MLX does it; the best scales for the weights; calibrated on text.
Method = Literal["rtn", "search", "gptq"]
METHODS: tuple[Method, ...] = ("rtn", "search", "gptq")
RECIPE_KEYS = {"bits", "group_size", "mode", "modules"}
MAX_RECIPE_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class Rule:
    """A format for the modules that `pattern` matches; None leaves them unquantized."""

    pattern: str
    spec: QuantSpec | None
    origin: str


@dataclass(frozen=True, slots=True)
class Target:
    """What the weights shall come to, by bits per weight or by bytes; either is given."""

    bits_per_weight: float | None = None
    size_bytes: int | None = None
    # Of all formats that are chosen; None leaves it open.
    group_size: int | None = None

    def total_bytes(self, parameters: int) -> int:
        """Bytes of all tensors of a model."""
        if self.size_bytes is not None:
            return self.size_bytes
        return int(Fraction(self.bits_per_weight or 0) * parameters / 8)

    @property
    def name(self) -> str:
        """As part of an output's name."""
        if self.size_bytes is not None:
            return f"{self.size_bytes / 1e6:.9g}MB"
        return f"{self.bits_per_weight:g}bpw"

    def __str__(self) -> str:
        if self.size_bytes is not None:
            return f"--target-size {self.name}"
        return f"--target-bpw {self.bits_per_weight:g}"


@dataclass(frozen=True, slots=True)
class Request:
    """What the user asks of a conversion.

    `default` is the format of all matrices without a rule; None keeps them as they are.
    """

    default: QuantSpec | None = None
    rules: tuple[Rule, ...] = ()
    # What matrices without a rule shall come to, in formats that are yet to be chosen.
    target: Target | None = None
    # How the codes of affine formats are found.
    method: Method = "rtn"
    # Changes of basis before that: scales from norm to matrix, and rotations.
    smooth: bool = False
    rotate: bool = False
    dequantize: bool = False
    requantize: bool = False
    # safetensors type of everything that is not codes; None lets the source decide.
    dtype: ScaleType | None = None
    allow_untied_head: bool = False
    allow_nonfinite: bool = False

    @property
    def quantizes(self) -> bool:
        """Whether any new quantization is asked for."""
        asked = self.default is not None or self.target is not None
        return asked or any(rule.spec is not None for rule in self.rules)


def resolve(request: Request, paths: Iterable[str]) -> dict[str, QuantSpec | None]:
    """The format asked for each module; None where it shall not be quantized anew.

    Raises:
        UsageError: a rule matches no module, or two rules disagree about one.
    """
    paths = list(paths)
    specs: dict[str, QuantSpec | None] = dict.fromkeys(paths, request.default)
    decided: dict[str, Rule] = {}
    for rule in request.rules:
        matched = [path for path in paths if fnmatchcase(path, rule.pattern)]
        if not matched:
            if rule.pattern == layout.HEAD:
                raise UsageError(
                    f"{rule.origin}: the model has no {layout.HEAD}: its head is the embedding; "
                    "use --embed-bits"
                )
            raise UsageError(f"{rule.origin}: {rule.pattern!r} matches no module of the model")
        for path in matched:
            other = decided.setdefault(path, rule)
            if other.spec != rule.spec:
                raise UsageError(
                    f"{rule.origin}: {rule.pattern!r} and {other.pattern!r} ({other.origin}) give "
                    f"{path} different formats; make one pattern narrower"
                )
            specs[path] = rule.spec
    return specs


def make_spec(bits: int | None, group_size: int | None, mode: str | None, origin: str) -> QuantSpec:
    """A format from options that may be missing.

    Raises:
        UsageError: MLX has no such format; the message lists what it has.
    """
    if mode is not None and mode != "affine":
        if mode not in FLOAT_MODES:
            raise UsageError(
                f"{origin}: mode {mode[:40]!r}: expected affine, {', '.join(FLOAT_MODES)}"
            )
        own_bits, own_group = FLOAT_MODES[mode]
        bits = own_bits if bits is None else bits
        group_size = own_group if group_size is None else group_size
    try:
        return QuantSpec(
            bits if bits is not None else 4,
            group_size if group_size is not None else DEFAULT_GROUP_SIZE,
            mode or "affine",  # type: ignore[arg-type]
        )
    except ValueError as error:
        raise UsageError(f"{origin}: {error}") from None


def parse_rule(text: str, group_size: int | None, origin: str = "--set") -> Rule:
    """A rule from `PATTERN=BITS[:GROUP]`; BITS may also be a mode, or `none` for unquantized."""
    pattern, equals, value = text.partition("=")
    if not equals or not pattern or not value:
        raise UsageError(
            f"{origin} {text[:80]!r}: expected PATTERN=BITS[:GROUP], for example '*.down_proj=6:32'"
        )
    bits, _, group = value.partition(":")
    name = f"{origin} {pattern[:80]}"
    if bits == "none":
        return Rule(pattern, None, name)
    if bits in FLOAT_MODES:
        return Rule(
            pattern, make_spec(None, _integer(group, name) if group else None, bits, name), name
        )
    group_value = _integer(group, name) if group else group_size
    return Rule(pattern, make_spec(_integer(bits, name), group_value, None, name), name)


def parse_target(
    bits_per_weight: str | None, size: str | None, group_size: int | None
) -> Target | None:
    """A target from `--target-bpw` or `--target-size`; None where neither is given.

    Raises:
        UsageError: both are given, or one is not a number or a size.
    """
    if size is not None:
        if bits_per_weight is not None:
            raise UsageError("--target-size: leave out --target-bpw; one decides the other")
        return Target(size_bytes=parse_size(size, "--target-size"), group_size=group_size)
    if bits_per_weight is None:
        return None
    if not re.fullmatch(r"\d{1,2}(\.\d{1,6})?", bits_per_weight, re.ASCII):
        raise UsageError(f"--target-bpw {bits_per_weight[:40]!r}: expected a number such as 3.2")
    return Target(float(bits_per_weight), group_size=group_size)


def module_rule(path: str, bits: int, group_size: int | None, origin: str) -> Rule:
    """A rule for one module, from its own option."""
    return Rule(path, make_spec(bits, group_size, None, origin), origin)


def read_recipe(path: Path) -> tuple[QuantSpec | None, tuple[Rule, ...]]:
    """The default format and the rules of a recipe file, TOML or JSON.

    `bits`, `group_size` and `mode` at the top give the default; `modules` maps patterns to
    `false` or to a table with the same three keys.
    """
    name = str(path)
    if not path.exists():
        raise UsageError(f"{name}: there is no such recipe")
    data = read_own_file(path, MAX_RECIPE_BYTES)
    values: Mapping[str, Any]
    try:
        if path.suffix == ".json":
            values = parse_object(data, name)
        else:
            values = tomllib.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{name}: is not valid TOML ({error})") from None
    _refuse_keys(values, RECIPE_KEYS, name)
    default = _recipe_spec(values, None, name) if values.keys() - {"modules"} else None
    modules = values.get("modules", {})
    if not isinstance(modules, dict):
        raise UsageError(f"{name}: modules: expected a table of patterns")
    rules = []
    for pattern, entry in modules.items():
        where = f"{name}: {pattern[:80]}"
        if entry is False:
            rules.append(Rule(pattern, None, where))
        elif isinstance(entry, dict):
            _refuse_keys(entry, RECIPE_KEYS - {"modules"}, where)
            rules.append(Rule(pattern, _recipe_spec(entry, default, where), where))
        else:
            raise UsageError(f"{where}: expected false or a table with bits, group_size, mode")
    return default, tuple(rules)


def _recipe_spec(values: Mapping[str, Any], default: QuantSpec | None, name: str) -> QuantSpec:
    numbers: dict[str, int | None] = {}
    for key in ("bits", "group_size"):
        value = values.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise UsageError(f"{name}: {key}: expected an integer, found {value!r}")
        numbers[key] = value
    mode = values.get("mode")
    if mode is not None and not isinstance(mode, str):
        raise UsageError(f"{name}: mode: expected a string, found {mode!r}")
    group_size = numbers["group_size"]
    if group_size is None and default is not None and (mode or "affine") == default.mode:
        group_size = default.group_size
    return make_spec(numbers["bits"], group_size, mode, name)


def _refuse_keys(values: Mapping[str, Any], known: set[str], name: str) -> None:
    unknown = sorted(values.keys() - known)
    if unknown:
        raise UsageError(
            f"{name}: unknown key {unknown[0][:60]!r}; expected {', '.join(sorted(known))}"
        )


def _integer(text: str, name: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 4:
        raise UsageError(
            f"{name}: {text[:40]!r}: expected {', '.join(map(str, AFFINE_BITS))} bits, "
            f"groups of {', '.join(map(str, AFFINE_GROUP_SIZES))}, a mode or none"
        )
    return int(text)
